"""The files of a run: its folder, checkpoints, metrics and provenance; how they are written and read."""

from loglinear.runs.checkpoints import resolve
from loglinear.runs.loading import load_checkpoint, load_model

__all__ = ["load_checkpoint", "load_model", "resolve"]

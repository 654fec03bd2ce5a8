"""Many sequences generated at once: rows of one batch, which join and leave between any two tokens."""

from loglinear.serving.engine import Engine

__all__ = ["Engine"]

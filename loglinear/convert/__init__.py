"""Checkpoints of other libraries as checkpoints of ours, with the same logits.

A new format needs one file in `formats` and one line in `FORMATS`.
"""

from loglinear.convert.conversion import Conversion, convert
from loglinear.convert.formats import FORMATS

__all__ = ["FORMATS", "Conversion", "convert"]

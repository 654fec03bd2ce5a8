"""`loglinear convert`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from loglinear.cli import console
from loglinear.convert import convert
from loglinear.models import parameter_counts


def run(path: Path, out: Path, source: str, levels: dict[str, Any]) -> None:
    """Convert the checkpoint, and print the new model and the notes."""
    result = convert(path, out, source=source, **levels)
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    config = result.config
    rows = [
        ["variant", config.variant],
        ["layers", f"{config.num_hidden_layers:,}"],
        ["levels", str(config.num_levels)],
        ["parameters", f"{parameter_counts(config).total:,}"],
        ["dtype", result.dtype],
    ]
    console.print_table(str(out), ["", "value"], rows)

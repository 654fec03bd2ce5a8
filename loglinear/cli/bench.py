"""`loglinear bench`: the scripts of the repository's benchmarks/ folder."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import loglinear


def run(name: str, arguments: list[str]) -> None:
    """Run benchmarks/NAME.py. Raises ValueError if the package was installed without its repository."""
    script = Path(loglinear.__file__).resolve().parent.parent / "benchmarks" / f"{name}.py"
    if not script.is_file():
        raise ValueError(
            f"there is no benchmarks/{name}.py: benchmarks are part of the repository, so run this in a clone of it"
        )
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent.parent))
    runpy.run_path(str(script), run_name="__main__")

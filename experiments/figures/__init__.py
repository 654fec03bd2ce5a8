"""Every figure and table of the experiments, from the JSON files that they wrote.

python -m experiments.figures
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from experiments.figures.ablations import ablations
from experiments.figures.long_text import long_text
from experiments.figures.mqar import mqar
from experiments.figures.needle import needle

FIGURES: tuple[Callable[[Path, Path], None], ...] = (long_text, ablations, needle, mqar)  # of the results there are

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    results: Annotated[Path, typer.Option(help="Folder of the experiments' JSON files.")] = Path("results"),
    out: Annotated[Path, typer.Option(help="Folder for figures and tables.")] = Path("docs/figures"),
) -> None:
    """Draw all figures and write all tables whose results there are.

    Results are long-text-KIND.json and ablation-CHOICE.json, of seed 0, needle-KIND.json with all its seeds, and
    mqar.json, which `loglinear eval mqar` writes.

    Example:

    python -m experiments.figures --out docs/figures
    """
    if not results.is_dir():
        raise ValueError(f"--results {results} is no folder")
    out.mkdir(parents=True, exist_ok=True)
    for draw in FIGURES:
        draw(results, out)
    print("\n".join(str(file) for file in sorted(out.iterdir())))

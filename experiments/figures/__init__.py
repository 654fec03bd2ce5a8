"""All figures and tables of the experiments, drawn from their JSON files.

python -m experiments.figures
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from experiments.figures.ablations import ablations
from experiments.figures.capacity import capacity
from experiments.figures.contexts import contexts
from experiments.figures.descent import descent
from experiments.figures.equal_bytes import equal_bytes
from experiments.figures.long_text import long_text
from experiments.figures.memory import memory
from experiments.figures.mqar import mqar
from experiments.figures.needle import needle
from experiments.figures.pictures import pictures
from experiments.figures.rl import rl
from experiments.figures.speed import speed
from experiments.figures.upgrade import upgrade
from loglinear.runs.folder import require_folder

# Each draws the figures whose results exist, and returns the files that it wrote.
FIGURES: tuple[Callable[[Path, Path], list[Path]], ...] = (
    contexts,
    long_text,
    ablations,
    needle,
    upgrade,
    capacity,
    rl,
    descent,
    mqar,
    equal_bytes,
    speed,
    memory,
)
RESULTS, DRAWN = Path("results"), Path("docs/figures")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    results: Annotated[Path, typer.Option(help="Folder of the experiments' JSON files.")] = RESULTS,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for figures and tables.", show_default=f"{DRAWN}, or figures/ in another folder of results"
        ),
    ] = None,
) -> None:
    """Draw all figures and write all tables whose results exist.

    Results are long-text-KIND.json and ablation-CHOICE.json of seed 0, mqar.json and mqar-zoology.json, which
    `loglinear eval mqar` writes, and the cells of `experiments.reads.compare`. Those of all seeds are
    long-text-8k-KIND.json, needle-KIND.json, upgrade-KIND.json, upgrade-needle-KIND.json, rl-KIND-TOKENS.json,
    capacity-KIND-SIZE-LOAD-DTYPE.json and descent-KIND-LOAD-DTYPE.json.

    Example:

    python -m experiments.figures --out docs/figures
    """
    if not results.is_dir():
        raise ValueError(f"--results {results} is no folder")
    if out is None:
        out = DRAWN if results.resolve() == RESULTS.resolve() else results / "figures"
    require_folder(out, "--out")
    out.mkdir(parents=True, exist_ok=True)
    written = [file for draw in FIGURES for file in draw(results, out)]
    if not written:
        raise ValueError(f"--results {results} has no result of an experiment")
    written += pictures(out)
    print("\n".join(map(str, written)))

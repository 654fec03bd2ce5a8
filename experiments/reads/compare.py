"""Compare candidates for the read of the buckets on MQAR: one table of small models.

python -m experiments.reads.compare --base mamba2 --dim 32 --read r16-f16-keys --read r16-f16-none --out runs/reads
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from experiments.reads.mixer import adapt
from experiments.reads.read import Read
from loglinear.cli import execute
from loglinear.cli.mqar import run as run_cells
from loglinear.recipes.mqar import PROTOCOLS
from loglinear.recipes.mqar_models import ALL_MODELS, MODELS

# Radices, finest blocks, scores, and one option at a time.
GRID = (
    *("r16-f16-keys", "r16-f16-none", "r2-f16-keys", "r4-f16-keys", "r8-f16-keys", "r16-f1-keys", "r16-f64-keys"),
    *("r16-f16-qk", "r16-f16-gram", "r16-f16-energy", "r16-f16-absorbed"),
    *("r16-f16-keys-late", "r16-f16-keys-residual", "r16-f16-keys-eta", "r16-f16-keys-unerased"),
)
# A quarter of the steps of the task's authors; a rate is chosen by one seed, and three others are reported.
PROTOCOL, EPOCHS = "reads", 8
PROTOCOLS[PROTOCOL] = PROTOCOLS["zoology"]._replace(
    learning_rates=(4e-3, 8e-3, 1.6e-2), tuning_seeds=(0,), seeds=(3, 4, 5)
)
BASES = ("mamba2", "gated_delta_net")

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def register(reads: tuple[str, ...]) -> None:
    """Make the models BASE_READ known to the table, in this process."""
    for base in BASES:
        for read in reads:
            candidate = functools.partial(_adapt, read=Read.parse(read))
            ALL_MODELS[f"{base}_{read}"] = MODELS[base]._replace(adapt=candidate)


def _adapt(model, length: int, read: Read) -> None:  # type: ignore[no-untyped-def]
    adapt(model, read, length)


register(GRID)  # in every worker, which imports this module


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for the results of cells, their checkpoints and mqar.json.")],
    base: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(BASES)}; repeat for several.")] = None,
    read: Annotated[
        list[str] | None, typer.Option(help=f"'linear', or one of {', '.join(GRID)}; repeat for several.")
    ] = None,
    dim: Annotated[list[int] | None, typer.Option(help="Dimension; repeat for several.")] = None,
    lr: Annotated[list[float] | None, typer.Option(help="Learning rate; the best of several has all seeds.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of weights and order; repeat for several.")] = None,
    protocol: Annotated[str, typer.Option(help="The training: 'reads', or one of `loglinear eval mqar`.")] = PROTOCOL,
    epochs: Annotated[int, typer.Option(help="Epochs of a cell.")] = EPOCHS,
    examples: Annotated[int | None, typer.Option(help="Training examples with each number of pairs.")] = None,
    processes: Annotated[int | None, typer.Option(help="Cells at once.", show_default="one per CPU core")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Save checkpoints and stop after about this many minutes.")
    ] = None,
) -> None:
    """Train the cells that are missing, and print the table."""
    models = tuple(b if r == "linear" else f"{b}_{r}" for b in base or BASES for r in read or ("linear", *GRID))
    run_cells(
        out,
        processes=processes,
        minutes=minutes,
        task=dict(protocol=protocol, epochs=epochs, examples=examples),
        models=[model for model in models if model != "mamba2_r16-f16-absorbed"],
        dims=dim or [32],
        learning_rates=lr,
        seeds=seed,
    )


if __name__ == "__main__":
    execute(app, "python -m experiments.reads.compare")

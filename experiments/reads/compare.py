"""Compare candidates for the read of the buckets on MQAR: one table of small models.

python -m experiments.reads.compare --base mamba2 --dim 32 --read r16-f16-keys --read r16-f16-none --out runs/reads
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Annotated

import typer

from experiments.reads.mixer import adapt
from experiments.reads.read import OPTIONS, SCORES, Read
from loglinear.cli import execute
from loglinear.cli.mqar import run as run_cells
from loglinear.cli.options import COUNT, RATE, SEED, Minutes
from loglinear.evaluation.mqar.cells import PROTOCOLS
from loglinear.evaluation.mqar.models import ALL_MODELS, MODELS
from loglinear.models import LogLinearForCausalLM

# The candidates that are compared by default: scores, partitions, and one option at a time.
GRID = (
    *("r16-f16-none", "r16-f16-keys", "r16-f16-gram", "r16-f16-qk", "r16-f16-energy", "r16-f16-absorbed"),
    *("r2-f16-gram", "r4-f16-gram", "r8-f16-gram", "r16-f1-gram", "r16-f64-gram"),
    *("r16-f16-gram-late", "r16-f16-gram-residual", "r16-f16-gram-eta", "r16-f16-gram-unerased"),
)
# A quarter of the authors' steps. One seed chooses the learning rate, and three others are reported.
PROTOCOL, EPOCHS = "reads", 8
PROTOCOLS[PROTOCOL] = PROTOCOLS["zoology"]._replace(
    learning_rates=(4e-3, 8e-3, 1.6e-2), tuning_seeds=(0,), seeds=(3, 4, 5)
)
BASES = ("mamba2", "gated_delta_net")

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def register() -> None:
    """Add the models BASE_READ to the table of this process, for all reads with at most one option."""
    options: list[dict[str, bool]] = [{}, *({option: True} for option in OPTIONS)]
    for radix, finest, score, option in itertools.product((2, 4, 8, 16), (1, 16, 64), SCORES, options):
        read = Read(radix, finest, score, **option)
        for base in BASES:
            ALL_MODELS[f"{base}_{read.name}"] = MODELS[base]._replace(adapt=functools.partial(_adapt, read=read))


def _adapt(model: LogLinearForCausalLM, length: int, read: Read) -> None:
    adapt(model, read, length)


register()  # also in every worker, because it imports this module


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for the results of cells, their checkpoints and mqar.json.")],
    base: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(BASES)}; repeat for several.")] = None,
    read: Annotated[
        list[str] | None, typer.Option(help=f"'linear', or a read such as {', '.join(GRID)}; repeat for several.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Also this model of `loglinear eval mqar`; repeat for several.")
    ] = None,
    dim: Annotated[list[int] | None, typer.Option(help="Dimension; repeat for several.", **COUNT)] = None,
    lr: Annotated[
        list[float] | None, typer.Option(help="Learning rate; the best of several has all seeds.", **RATE)
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Seed of weights and order; repeat for several.", **SEED)
    ] = None,
    protocol: Annotated[str, typer.Option(help="The training: 'reads', or one of `loglinear eval mqar`.")] = PROTOCOL,
    epochs: Annotated[int, typer.Option(help="Epochs of a cell.", **COUNT)] = EPOCHS,
    examples: Annotated[int | None, typer.Option(help="Training examples with each number of pairs.", **COUNT)] = None,
    processes: Annotated[
        int | None, typer.Option(help="Cells at once.", show_default="one per CPU core", **COUNT)
    ] = None,
    minutes: Minutes = None,
) -> None:
    """Train the cells that are missing, and print the table."""
    for name in read or ():
        if name != "linear" and f"{BASES[0]}_{Read.parse(name).name}" not in ALL_MODELS:
            raise ValueError(f"read must have a radix of 2 to 16, blocks of 1, 16 or 64 and one option, got {name!r}")
    reads = read or (() if model else ("linear", *GRID))
    models = [*(b if r == "linear" else f"{b}_{r}" for b in base or BASES for r in reads), *(model or ())]
    run_cells(
        out,
        processes=processes,
        minutes=minutes,
        task=dict(protocol=protocol, epochs=epochs, examples=examples),
        models=[name for name in models if name != "mamba2_r16-f16-absorbed"],
        dims=dim or [32],
        learning_rates=lr,
        seeds=seed,
    )


if __name__ == "__main__":
    execute(app, "python -m experiments.reads.compare")

"""Choices of the log-linear model, one changed at a time, on the long texts of `experiments.long_text`.

python -m experiments.ablations run --choice unit --out runs/ablations/unit --minutes 9
python -m experiments.figures
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.long_text import Data, run_on_long_text
from experiments.runs import BatchTokens, Compile, Minutes, Out, Results, Seed, SeqLen, Steps, program
from loglinear.cli import execute
from loglinear.recipes import TrainingRecipe, get_recipe
from loglinear.recipes.long_text import CAPPED_LEVELS

STEPS = 500
DEFAULT = "softplus"  # the published choice: all levels, each with a lambda of its own, from single tokens on
CHOICES: dict[str, dict[str, Any]] = {  # what each changes in the model's configuration
    DEFAULT: {},
    "bounded": {"lambda_form": "bounded"},
    "unit": {"lambda_form": "unit"},
    "capped": {"num_levels": CAPPED_LEVELS},
    "blocks": {"finest_block": 64},  # one lambda for the tokens of a chunk: a hierarchy of chunks
}

app = program(__doc__)


def ablation(choice: str) -> TrainingRecipe:
    """The recipe long_text_log_linear with one of CHOICES, for STEPS steps. Raises ValueError for another choice."""
    if choice not in CHOICES:
        raise ValueError(f"choice must be one of {', '.join(CHOICES)}, got {choice!r}")
    recipe = get_recipe("long_text_log_linear").override(steps=STEPS)
    return dataclasses.replace(recipe, name=f"ablation_{choice}", model={**recipe.model, **CHOICES[choice]})


@app.command()
def run(
    choice: Annotated[str, typer.Option(help=f"{', '.join(CHOICES)}.")],
    out: Out,
    data: Data = Path("data/long_text"),
    steps: Steps = None,
    seq_len: SeqLen = None,
    batch_tokens: BatchTokens = None,
    seed: Seed = None,
    compile: Compile = None,
    minutes: Minutes = None,
    results: Results = Path("results"),
) -> None:
    """Train a model with one choice, or go on where its run stands, and evaluate it: ablation-CHOICE.json.

    Training may be ended at any time: the next call goes on from the last checkpoint. The evaluation behind it takes
    minutes of its own, not counted in --minutes; one that is ended begins anew.

    Example, to be called until it exits with 0:

    python -m experiments.ablations run --choice unit --out runs/ablations/unit --minutes 9
    """
    run_on_long_text(
        ablation(choice),
        out,
        data,
        results / f"ablation-{choice}.json",
        steps=steps,
        seq_len=seq_len,
        batch_tokens=batch_tokens,
        seed=seed,
        compile=compile,
        minutes=minutes,
    )


if __name__ == "__main__":
    execute(app, "python -m experiments.ablations")

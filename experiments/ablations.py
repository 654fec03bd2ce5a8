"""Ablations: log-linear models with one choice changed, on the long texts of `experiments.long_text`.

python -m experiments.ablations run --choice unit --out runs/ablations/unit --minutes 9
python -m experiments.figures
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from experiments.long_text import Data, evaluate, run_on_long_text
from experiments.recipes.comparison import CAPPED_BY
from experiments.recipes.long_text import long_text_16k
from experiments.runs import Options, Out, program, with_options
from loglinear.cli import execute
from loglinear.recipes import TrainingRecipe
from loglinear.recipes.choices import PUBLISHED, choices

STEPS, BATCH_TOKENS = 500, 131_072
DEFAULT = "softplus"  # the published model

app = program(__doc__)


def changes(recipe: TrainingRecipe) -> dict[str, dict[str, Any]]:
    """Return the configuration of each choice, for the log-linear model of a recipe."""
    return {DEFAULT: PUBLISHED, **choices(capped_levels=recipe.model["num_levels"] - CAPPED_BY)}


CHOICES = tuple(changes(long_text_16k("log_linear")))


def ablation(choice: str, *, miniature: bool = False) -> TrainingRecipe:
    """Return the recipe long_text_log_linear with one of CHOICES, for STEPS steps. Raises ValueError for others."""
    if choice not in CHOICES:
        raise ValueError(f"choice must be one of {', '.join(CHOICES)}, got {choice!r}")
    recipe = long_text_16k("log_linear", miniature=miniature)
    model = {**recipe.model, **changes(recipe)[choice]}
    size = {} if miniature else dict(steps=STEPS, batch_tokens=BATCH_TOKENS, eval_every=150, save_every=150)
    name = recipe.name.replace("long_text_log_linear", f"ablation_{choice}")
    return dataclasses.replace(recipe.override(**size), name=name, model=model)


@app.command()
@with_options
def run(
    choice: Annotated[str, typer.Option(help=f"One of {', '.join(CHOICES)}.")],
    out: Out,
    data: Data = None,
    *,
    options: Options,
) -> None:
    """Train or resume a model with one choice, evaluate it at the end, and write ablation-CHOICE.json.

    Training can stop at any time: the next call resumes it from the last checkpoint. The evaluation takes further
    minutes, which --minutes does not include. An interrupted evaluation starts again.

    Example, to repeat until it exits with 0:

    python -m experiments.ablations run --choice unit --out runs/ablations/unit --minutes 9
    """
    run_on_long_text(ablation(choice, miniature=options.miniature), out, data, f"ablation-{choice}", options, evaluate)


if __name__ == "__main__":
    execute(app, "python -m experiments.ablations")

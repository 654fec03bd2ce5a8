"""Retrieval from long text: five models of one size, trained at 4,096 tokens and asked within and past that length.

python -m experiments.needle run --kind log_linear --out runs/needle/log_linear --minutes 9
python -m experiments.figures
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.runs import Kind, Options, Out, kind_recipe, program, train_and_evaluate, with_options
from loglinear.cli import execute
from loglinear.evaluation.needle import evaluate_sets, example_sets
from loglinear.models import LogLinearForCausalLM
from loglinear.recipes import TrainingRecipe
from loglinear.recipes.needle import LONGEST
from loglinear.training import load_tokenizer
from loglinear.training.sources import read_documents

LENGTHS = (1024, 2048, 4096, 8192, LONGEST)  # tokens of the examples

app = program(__doc__)


@app.command()
@with_options
def run(
    kind: Kind,
    out: Out,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text to hide the tests' needles in, as for training; without it in noise, and no single_2."),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Examples of every task and length.")] = 200,
    *,
    options: Options,
) -> None:
    """Train one model, or go on where its run stands, and evaluate it once it is trained: needle-KIND.json.

    Training may be ended at any time: the next call goes on from the last checkpoint. The evaluation behind it takes
    minutes of its own, not counted in --minutes; one that is ended begins anew. All models, of any seed, answer the
    same examples. --data should be a text that is not in the training, which has Python's standard library: the
    validation text of `experiments.long_text`, for one.

    Example, to be called until it exits with 0:

    python -m experiments.needle run --kind log_linear --out runs/needle/log_linear --minutes 9
    --data data/long_text/validation.jsonl.zst
    """
    recipe = kind_recipe("needle", kind, options.miniature)
    tokenizer = load_tokenizer(recipe.tokenizer or "bytes")
    for name in data or ():
        if name.endswith(".jsonl.zst") and not Path(name).is_file():
            raise ValueError(f"there is no {name}: `python -m experiments.long_text prepare` makes the long texts")
    texts = [document.text for document in read_documents(data or ())]
    sets = example_sets(tokenizer, texts, lengths=LENGTHS, count=examples)  # what is wrong is known before training

    def evaluate(model: LogLinearForCausalLM, recipe: TrainingRecipe) -> dict[str, Any]:
        return {"data": data or [], "examples": examples, "tasks": evaluate_sets(model, tokenizer, sets)}

    train_and_evaluate(recipe, out, evaluate, f"needle-{kind}", options)


if __name__ == "__main__":
    execute(app, "python -m experiments.needle")

"""Language models of long texts: the data, ten kinds of model, and their loss with far text and without it.

python -m experiments.long_text prepare
python -m experiments.long_text run --kind log_linear --out runs/long_text/log_linear --minutes 9
python -m experiments.figures
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.contexts import evaluate_contexts
from experiments.prepare import prepare as prepare_corpus
from experiments.prepare import prepare_miniature
from experiments.runs import Kind, Options, Out, kind_recipe, program, train_and_evaluate, with_options
from loglinear.cli import execute
from loglinear.cli.console import print_table
from loglinear.data.corpus import Corpus, read_corpus
from loglinear.evaluation import evaluate_perplexity
from loglinear.models import LogLinearForCausalLM
from loglinear.recipes import TrainingRecipe
from loglinear.training import load_tokenizer

CONTEXTS = (1 / 8, 1 / 4, 1 / 2, 1, 2)  # most tokens that a target is predicted from, in training lengths
LENGTHS = (1, 4)  # of the windows of the earlier round, in training lengths
BINS = 4  # of positions in a training length, in the earlier round's curves of each document
EARLIER = "16k"

app = program(__doc__)
FOLDER, MINIATURE_FOLDER = Path("data/long_text"), Path("data/long_text_miniature")
Data = Annotated[
    Path | None,
    typer.Option(
        help=f"Folder of train.jsonl.zst and validation.jsonl.zst.  [default: {FOLDER}, or {MINIATURE_FOLDER}]"
    ),
]


@app.command()
def prepare(
    out: Data = None,
    miniature: Annotated[
        bool, typer.Option("--miniature", help="Take 4 MB of Python's standard library: no download, half a minute.")
    ] = False,
) -> None:
    """Make the two texts from packages of Debian 12: a download of 330 MB and ten minutes on two cores.

    Examples:

    python -m experiments.long_text prepare --out data/long_text

    python -m experiments.long_text prepare --miniature
    """
    statistics = prepare_miniature(out or MINIATURE_FOLDER) if miniature else prepare_corpus(out or FOLDER)
    for name in ("train", "validation"):
        part = statistics[name]
        rows = [[size, f"{of['documents']}", f"{of['bytes'] / 1e6:.1f}"] for size, of in part["documents_of"].items()]
        rows.append(["all", str(part["documents"]), f"{part['bytes'] / 1e6:.1f}"])
        print_table(f"{name}: {part['compressed_bytes'] / 1e6:.1f} MB compressed", ["size", "documents", "MB"], rows)


@app.command()
@with_options
def run(
    kind: Kind,
    out: Out,
    data: Data = None,
    windows: Annotated[
        str, typer.Option(help=f"Length of the training windows: 8k, or {EARLIER} for the earlier round.")
    ] = "8k",
    *,
    options: Options,
) -> None:
    """Train or resume one model, evaluate it at the end of the training, and write long-text-8k-KIND.json.

    Training can stop at any time: the next call resumes it from the last checkpoint. The evaluation takes further
    seconds, which --minutes does not include. An interrupted evaluation starts again. With --windows 16k the models
    have 13.3 M parameters, the result is long-text-KIND.json, and the evaluation takes minutes.

    Example, to repeat until it exits with 0:

    python -m experiments.long_text run --kind log_linear --out runs/long_text/log_linear --minutes 9
    """
    if windows not in ("8k", EARLIER):
        raise ValueError(f"--windows must be 8k or {EARLIER}, got {windows!r}")
    if windows == EARLIER:
        recipe, measure, name = kind_recipe("long_text", kind, options.miniature), evaluate, f"long-text-{kind}"
    else:
        recipe = kind_recipe("long_text_8k", kind, options.miniature)
        measure, name = evaluate_far_text, f"long-text-8k-{kind}"
    run_on_long_text(recipe, out, data, name, options, measure)


Measure = Callable[[LogLinearForCausalLM, TrainingRecipe, Path], dict[str, Any]]  # the path is the validation text


def run_on_long_text(
    recipe: TrainingRecipe, out: Path, data: Path | None, name: str, options: Options, measure: Measure
) -> None:
    """Run `train_and_evaluate` on the two texts in the folder `data`. Raises ValueError if one of them is missing."""
    data = data or (MINIATURE_FOLDER if options.miniature else FOLDER)
    if data.is_file():
        raise ValueError(f"--data must be the folder of train.jsonl.zst and validation.jsonl.zst, got the file {data}")
    training, validation = data / "train.jsonl.zst", data / "validation.jsonl.zst"
    for file in (training, validation):
        if not file.is_file():
            command = f"python -m experiments.long_text prepare{' --miniature' * options.miniature}"
            raise ValueError(f"there is no {file}: run `{command}` first")
    train_and_evaluate(
        recipe,
        out,
        lambda model, recipe: measure(model, recipe, validation),
        name,
        options,
        data=(str(training),),
    )


def evaluate_far_text(model: LogLinearForCausalLM, recipe: TrainingRecipe, validation: Path) -> dict[str, Any]:
    """Return the loss of a model on the same text for each of CONTEXTS (`experiments.contexts`)."""
    contexts = [int(times * recipe.seq_len) for times in CONTEXTS]
    corpus = _validation_text(recipe, validation, max(contexts))
    return {"fingerprint": corpus.fingerprint, **evaluate_contexts(model, corpus, contexts)}


def evaluate(model: LogLinearForCausalLM, recipe: TrainingRecipe, validation: Path) -> dict[str, Any]:
    """Return the loss of a model on the beginning of every long validation document, for windows of each of LENGTHS.

    The windows of every length cover the same text: as many tokens of each document as the longest window has.
    """
    longest = max(LENGTHS) * recipe.seq_len
    corpus = _validation_text(recipe, validation, longest)
    evaluation = {"documents": len(corpus.names), "fingerprint": corpus.fingerprint}
    for length in (times * recipe.seq_len for times in LENGTHS):
        result = evaluate_perplexity(model, corpus, length=length, max_tokens=longest * len(corpus.names))
        evaluation[str(length)] = {**result.to_dict(), "by_document": result.by_document(recipe.seq_len // BINS)}
    return evaluation


def _validation_text(recipe: TrainingRecipe, validation: Path, tokens: int) -> Corpus:
    """Return the documents of at least `tokens` tokens. Raises ValueError if there is none."""
    corpus = read_corpus([str(validation)], load_tokenizer(recipe.tokenizer or "bytes"))
    long = [d for d in range(len(corpus.names)) if len(corpus.document(d)) >= tokens]
    if not long:
        raise ValueError(f"the validation text has no document of {tokens:,} tokens")
    return corpus.take(long)


if __name__ == "__main__":
    execute(app, "python -m experiments.long_text")

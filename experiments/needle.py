"""Retrieval from long text: ten models of one size, trained at 2,048 tokens and tested within and past that length.

python -m experiments.needle prepare
python -m experiments.needle run --kind log_linear --out runs/needle/log_linear --minutes 9
python -m experiments.figures
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from experiments.recipes.needle import SEQUENCE, TOKENIZER, VOCABULARY
from experiments.runs import Kind, Options, Out, kind_recipe, program, train_and_evaluate, with_options
from experiments.tokens import tokens_of
from loglinear.cli import execute
from loglinear.cli.options import COUNT, above_zero, of_recipe
from loglinear.data.corpus import Corpus, split
from loglinear.data.sources import read_documents
from loglinear.evaluation.needle import evaluate_sets, example_sets
from loglinear.models import LogLinearForCausalLM
from loglinear.recipes import TrainingRecipe
from loglinear.runs.folder import RUN_FILE, run_recipe
from loglinear.runs.json_files import read_object
from loglinear.runs.metrics import read_metrics
from loglinear.training import load_tokenizer

LENGTHS = (SEQUENCE // 2, SEQUENCE, 2 * SEQUENCE, 4 * SEQUENCE, 8 * SEQUENCE)  # tokens of the examples
TOKENIZER_DATA = ("needle:20000:12000", "stdlib")  # training text of the tokenizer
TIMES = 2000  # repetitions of the digits, more than of most pairs of tokens
END = "<|endoftext|>"

app = program(__doc__)
TokenizerFolder = Annotated[Path, typer.Option(help="Folder of the tokenizer that `prepare` makes.")]


@app.command()
def prepare(tokenizer: TokenizerFolder = Path(TOKENIZER)) -> None:
    """Make the tokenizer in half a minute. It is the same on every machine with the same Python.

    Example:

    python -m experiments.needle prepare
    """
    texts = (document.text for document in read_documents(TOKENIZER_DATA))
    trained = byte_pair_tokenizer(texts, VOCABULARY)
    trained.save_pretrained(str(tokenizer))
    print(f"tokenizer of {len(trained):,} tokens written to {tokenizer}")


def byte_pair_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Return a byte-pair encoding (Sennrich et al., arXiv 1508.07909) of bytes, with digits in groups of three.

    Groups count from the left. All of them are tokens, because random numbers have no frequent parts.
    """
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    groups = " ".join(f"{number:03}" for number in range(1000))
    tokenizer.train_from_iterator(itertools.chain(texts, itertools.repeat(groups, TIMES)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


@app.command()
@with_options
def run(
    kind: Kind,
    out: Out,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text of the haystacks; without it they are noise, and single_2 is left out."),
    ] = None,
    examples: Annotated[int, typer.Option(help="Examples of every task and length.", **COUNT)] = 200,
    tokenizer: TokenizerFolder = Path(TOKENIZER),
    levels: Annotated[
        int | None,
        of_recipe("Levels of the log-linear model, as a result of its own.", **COUNT),
    ] = None,
    embedding_range: Annotated[
        float | None,
        of_recipe("Deviation of the first embeddings, as a result of its own.", **above_zero()),
    ] = None,
    *,
    options: Options,
) -> None:
    """Train or resume one model, evaluate it at the end of the training, and write needle-KIND.json.

    Training can stop at any time: the next call resumes it from the last checkpoint. The evaluation takes further
    minutes, which --minutes does not include. An interrupted evaluation starts again. The first run makes the tokens
    of the training text, which stay in the folder `tokens` beside the tokenizer. All models of all seeds answer
    the same examples. --data should not be training text, which is Python's standard library. The validation text of
    `experiments.long_text` is suitable.

    Example, to repeat until it exits with 0:

    python -m experiments.needle run --kind log_linear --out runs/needle/log_linear --minutes 9
    --data data/long_text/validation.jsonl.zst
    """
    recipe = kind_recipe("needle", kind, options.miniature)
    if levels is not None and kind != "log_linear":
        raise ValueError(f"--levels goes with --kind log_linear, got {kind}")
    if not tokenizer.is_dir():
        raise ValueError(f"there is no tokenizer {tokenizer}: run `python -m experiments.needle prepare` first")
    tokens = load_tokenizer(tokenizer)
    for name in data or ():
        if name.endswith(".jsonl.zst") and not Path(name).is_file():
            raise ValueError(f"there is no {name}: run `python -m experiments.long_text prepare` first")
    texts = [document.text for document in read_documents(data or ())]
    sets = example_sets(tokens, texts, lengths=LENGTHS, count=examples)  # mistakes show before the training

    def corpora(recipe: TrainingRecipe) -> tuple[Corpus, Corpus]:
        corpus = tokens_of(recipe.data, str(tokenizer), tokenizer.parent / "tokens")
        return split(corpus, recipe.validation_fraction)

    def evaluate(model: LogLinearForCausalLM, recipe: TrainingRecipe) -> dict[str, Any]:
        return {"tasks": evaluate_sets(model, tokens, sets)}

    name = f"needle-{kind}"
    name += "" if levels is None else f"-levels{levels}"
    name += "" if embedding_range is None else f"-embedding{embedding_range:g}"
    eval_settings = {"data": data or [], "examples": examples}
    train_and_evaluate(
        recipe,
        out,
        evaluate,
        name,
        options,
        eval_settings=eval_settings,
        corpora=corpora,
        tokenizer=str(tokenizer),
        num_levels=recipe.model["num_levels"] if levels is None else levels,
        embedding_range=recipe.model.get("embedding_range") if embedding_range is None else embedding_range,
    )


class Trial(NamedTuple):
    """The last validation of one run of a search."""

    kind: str
    rate: float
    seed: int
    bits: float  # per byte
    step: int
    steps: int

    @classmethod
    def of(cls, recipe: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> Trial | None:
        """Return the trial of a recipe and its records; None before the first validation."""
        validation = [record for record in records if record["split"] == "validation"]
        if not validation:
            return None
        kind, last = recipe["name"].removeprefix("needle_"), validation[-1]
        return cls(kind, recipe["learning_rate"], recipe["seed"], last["bits_per_byte"], last["step"], recipe["steps"])


def read_trials(folder: Path) -> list[Trial]:
    """Return the trials of the results in folders of `folder`, and of runs in and below them that have no result."""
    files = sorted(folder.glob("*/needle-*.json"))
    results = [Trial.of(result["recipe"], result["training"]["curve"]) for result in map(read_object, files)]
    outs = [file.parent for depth in ("*", "*/*") for file in sorted(folder.glob(f"{depth}/{RUN_FILE}"))]
    runs = [Trial.of(run_recipe(out).to_dict(), read_metrics(out)) for out in outs]
    found = {trial[:3]: trial for trial in (*runs, *results) if trial is not None}  # a result replaces its run
    return list(found.values())


@app.command()
def rates(
    folder: Annotated[Path, typer.Argument(help="Folder of the results of a search, one folder per rate.")],
) -> None:
    """Print the last validation loss, in bits per byte, of every kind and learning rate: the mean over seeds.

    A search is `run` with --learning-rate, seeds that are not reported, and a folder of results for each rate. The
    recipe then takes each kind's best rate, so no test example decides it. Unfinished runs in these folders count
    with their last validation. The line names its step, because their losses are still falling.

    Example:

    python -m experiments.needle rates runs/needle/rates
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder, expected that of the results of a search")
    by_kind: dict[str, dict[float, list[Trial]]] = defaultdict(lambda: defaultdict(list))
    for trial in sorted(read_trials(folder)):
        by_kind[trial.kind][trial.rate].append(trial)
    if not by_kind:
        raise ValueError(f"{folder} holds no results of a search: expected RATE/needle-KIND-seedSEED.json")
    for kind, by_rate in by_kind.items():
        means = {rate: sum(trial.bits for trial in trials) / len(trials) for rate, trials in by_rate.items()}
        best = min(means, key=lambda rate: means[rate])
        shown = ", ".join(f"{rate:g}: {bits:.3f}{_unfinished(by_rate[rate])}" for rate, bits in means.items())
        print(f"{kind}: best {best:g} ({shown})")


def _unfinished(trials: Iterable[Trial]) -> str:
    """Return the words for the run that has trained least, or none if all have reached their end."""
    least = min(trials, key=lambda trial: trial.step / trial.steps)
    return f" unfinished, step {least.step:,} of {least.steps:,}" if least.step < least.steps else ""


if __name__ == "__main__":
    execute(app, "python -m experiments.needle")

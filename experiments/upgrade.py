"""The gain of an upgrade, which is trained a little more, compared with its linear model after as many steps.

python -m experiments.needle prepare
python -m experiments.upgrade run --out runs/upgrade --minutes 9

All seeds continue one linear model. They can run at once, each kind and seed in a process of its own. A process that
needs the linear model waits for it:

for kind in linear levels_new levels_all routed_new routed_all; do for seed in 0 1 2; do
    python -m experiments.upgrade run --kind base --kind $kind --seed $seed --out runs/upgrade &
done; done; wait

To continue on another machine, copy the results and the folder OUT/linear-start.

With --base the linear model is not trained here but comes from a finished run, such as one of `experiments.needle`:

    python -m experiments.needle run --kind linear_states4 --seed 0 --out runs/needle/linear_states4-0
    python -m experiments.upgrade run --base runs/needle/linear_states4-0 --out runs/upgrade-needle

The continuations have the seed of this linear model, so each seed continues a model of its own. The results are
upgrade-needle-KIND.json.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer

from experiments.locks import alone
from experiments.needle import TokenizerFolder
from experiments.recipes.comparison import ROUTED
from experiments.recipes.needle import TOKENIZER
from experiments.recipes.upgrade import (
    ALL_RATE,
    BASE,
    CONTINUATIONS,
    FULL,
    MINIATURE,
    NEW_RATE,
    Sizes,
    base_recipe,
    continuation,
    found_recipe,
)
from experiments.results import mean_and_deviation, read_seeds, require_replaceable, result_file
from experiments.runs import Options, evaluate_run, program, train_and_evaluate
from experiments.tokens import tokens_of
from loglinear.cli import execute
from loglinear.cli.console import Interrupted, human_bytes, print_table
from loglinear.cli.options import COUNT, RATE, SEED, Minutes, of_recipe, option
from loglinear.convert.target import CHOICES, Converted, build, configuration, write
from loglinear.data.corpus import Corpus, split, tokenize
from loglinear.data.sources import read_documents
from loglinear.data.tokenizer import BYTES
from loglinear.evaluation import evaluate_perplexity
from loglinear.evaluation.needle import IN_TEXT, evaluate_sets, example_sets
from loglinear.fenwick import num_levels
from loglinear.models import LogLinearForCausalLM
from loglinear.models.size import state_bytes
from loglinear.recipes import TrainingRecipe
from loglinear.runs.checkpoints import resolve, step_of
from loglinear.runs.folder import run_recipe
from loglinear.runs.loading import own_config
from loglinear.training import load_model, load_tokenizer

SEEDS = (0, 1, 2)  # of the continuations
EVAL_CHARACTERS = 1 << 15  # from the beginning of each document, because all 26 MB take a minute of a CPU
TASKS = ("single_2", "multikey_1", "multiquery")
KINDS = (BASE, *CONTINUATIONS)
OWN, FOUND = "upgrade", "upgrade-needle"  # how results' names begin: for a linear model trained here, and with --base

app = program(__doc__)


def write_upgraded(linear: Path, out: Path, levels: dict[str, Any], dtype: torch.dtype | None = None) -> None:
    """Write the linear model of a checkpoint as a log-linear model with the same logits, as an upgrade makes it.

    With a `dtype` the weights are rounded to that dtype first.
    """
    model = load_model(linear)
    fields = {name: value for name, value in model.config.to_dict().items() if name not in (*CHOICES, "routing_tau")}
    weights = {name: tensor.to(dtype or tensor.dtype) for name, tensor in model.state_dict().items()}
    write(build(configuration(fields, levels), Converted(fields, weights, [])), linear, out)


class Linear(NamedTuple):
    """The linear model from which continuations start."""

    recipe: TrainingRecipe
    run: Path
    """The folder of its training."""
    out: Path
    """The folder of the models from which the continuations start, and of their runs."""
    found: bool
    """True if the model was trained elsewhere. Then its seed is also that of its continuations."""

    @property
    def results(self) -> str:
        """The beginning of the results' names."""
        return FOUND if self.found else OWN


def found_linear(run: Path, out: Path) -> Linear:
    """Return the linear model of a finished run. Its continuations have a folder of their own in `out`.

    Raises ValueError if the run is not finished, or if its model has levels or attention.
    """
    recipe, checkpoint = run_recipe(run, "--base"), resolve(run)
    config = own_config(checkpoint)
    layers = sorted({*(config.layer_types or ())})
    if config.num_levels != 1 or layers != ["linear_attention"]:
        raise ValueError(
            f"--base must hold a model of linear layers with 1 level, got {run} "
            f"with {config.num_levels} levels and layers of {', '.join(layers)}"
        )
    if step_of(checkpoint) < recipe.steps:
        raise ValueError(f"--base {run} is not finished: step {step_of(checkpoint):,} of {recipe.steps:,}")
    return Linear(found_recipe(recipe), run, out / f"{recipe.name}-{recipe.seed}", found=True)


def start_folder(kind: str, out: Path) -> Path:
    """Return the folder of the model from which one of CONTINUATIONS starts, in all seeds."""
    return out / f"{CONTINUATIONS[kind].form}-start"


def write_linear_start(linear: Linear) -> None:
    """Write the trained linear model in bfloat16, as models are published, unless it is there.

    Raises ValueError if another model is there. Raises it also if the run is unfinished although its result is there.
    """
    start = start_folder("linear", linear.out)
    if not start.exists():  # it appears whole
        checkpoint, steps = resolve(linear.run), run_recipe(linear.run).steps
        if step_of(checkpoint) < steps:
            at = f"{linear.run} is at step {step_of(checkpoint):,} of {steps:,}"
            raise ValueError(f"{at}, but its result is there: put the finished run in its place")
        write_upgraded(checkpoint, start, {"num_levels": 1}, torch.bfloat16)
    weights, ours = load_model(start).state_dict(), load_model(linear.run).state_dict()
    if any(not torch.equal(tensor.bfloat16(), ours[name].bfloat16()) for name, tensor in weights.items()):
        raise ValueError(f"{start} is not the model of {linear.run}: choose another --out")


def write_start(kind: str, out: Path, sizes: Sizes) -> None:
    """Make the model from which one of CONTINUATIONS starts out of the linear start, unless it is there.

    Raises ValueError if there is no linear start yet.
    """
    linear, start, form = start_folder("linear", out), start_folder(kind, out), CONTINUATIONS[kind].form
    if not linear.exists():
        raise ValueError(f"there is no trained linear model {linear}: run --kind {BASE} to its end first")
    with alone(out / f".{start.name}.lock"):
        if not start.exists():
            write_upgraded(linear, start, ROUTED if form == "routed" else {"num_levels": num_levels(sizes.longest)})


class Texts:
    """The training texts as tokens, from a folder that all processes share; the last one stays in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last: tuple[tuple[str, ...], tuple[Corpus, Corpus]] | None = None

    def of(self, recipe: TrainingRecipe) -> tuple[Corpus, Corpus]:
        """Return the corpora of a recipe, for training and validation."""
        if self.last is None or self.last[0] != recipe.data:
            self.last = None  # a text has hundreds of megabytes
            corpus = tokens_of(recipe.data, recipe.tokenizer or BYTES, self.folder)
            self.last = recipe.data, split(corpus, recipe.validation_fraction)
        return self.last[1]


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder of all training runs.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text of the haystacks and of the bits per byte. Without it the haystacks are noise."),
    ] = None,
    examples: Annotated[int, typer.Option(help="Examples of every task and length.", **COUNT)] = 50,
    tokenizer: TokenizerFolder = Path(TOKENIZER),
    seed: Annotated[
        list[int] | None,
        typer.Option(help="A seed of the continuations; repeatable. Without it 0, 1 and 2, or that of --base.", **SEED),
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(KINDS)}; repeatable. Without it all of them.")
    ] = None,
    tokens: Annotated[Path, typer.Option(help="Folder that keeps the training texts as tokens, for all seeds.")] = Path(
        "data/upgrade"
    ),
    base: Annotated[
        Path | None,
        typer.Option(help="Run folder of a finished linear model to start from. Without it one is trained."),
    ] = None,
    base_steps: Annotated[int | None, of_recipe("Optimiser steps of the linear model.", **COUNT)] = None,
    steps: Annotated[int | None, option(str(FULL.steps), "Optimiser steps of each continuation.", **COUNT)] = None,
    learning_rate: Annotated[
        float | None,
        option(f"{NEW_RATE:g} for new weights, {ALL_RATE:g}", "Peak of the continuations' learning rate.", **RATE),
    ] = None,
    compile: Annotated[
        bool,
        typer.Option("--compile/--no-compile", help="Compile the blocks: each training then starts minutes later."),
    ] = False,
    miniature: Annotated[
        bool, typer.Option("--miniature", help="Train tiny models on a CPU, in some minutes for all kinds, as a test.")
    ] = False,
    minutes: Minutes = None,
    results: Annotated[
        Path, typer.Option(help="Folder for the JSON files; those of a miniature go to miniature/ in it.")
    ] = Path("results"),
) -> None:
    """Train a linear model, then five continuations of it for every seed; write upgrade-KIND.json, and a table.

    The linear model is continued in five ways for equally many steps. One way leaves it as it is. The others upgrade it
    to weights from the token (levels) or also from the buckets (routed), and train the new weights or all weights.

    With --base the linear model is that of a finished run, and the continuations have its seed. The results are
    upgrade-needle-KIND.json. A linear model of `experiments.needle` can find needles before it is upgraded.

    Everything can stop at any time: the next call skips what has a result, and resumes the training that was stopped.
    An evaluation takes further minutes, which --minutes does not include. --data should not be training text.

    Example, to repeat until it exits with 0:

    python -m experiments.upgrade run --out runs/upgrade --minutes 9 --data data/long_text/validation.jsonl.zst
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    sizes = MINIATURE if miniature else FULL
    if steps is not None:
        sizes = sizes._replace(steps=steps)
    for name in kind or ():
        if name not in KINDS:
            raise ValueError(f"--kind must be one of {', '.join(KINDS)}, got {name!r}")
    if base is None:
        linear = Linear(base_recipe(miniature=miniature).override(steps=base_steps), out / BASE, out, found=False)
    elif base_steps is not None:
        raise ValueError("--base-steps goes with a linear model that is trained here: leave it out with --base")
    else:
        linear = found_linear(base, out)
    if not miniature:
        linear = linear._replace(recipe=linear.recipe.override(tokenizer=str(tokenizer)))
    seeds = tuple(seed or ((linear.recipe.seed,) if linear.found else SEEDS))
    if linear.found and seeds != (linear.recipe.seed,):
        raise ValueError(f"--seed must be {linear.recipe.seed}, the seed of --base {base}, or left out, got {seeds}")
    evaluate = evaluation(linear.recipe, sizes, data or [], examples)
    texts = Texts(tokens)
    trained = False  # becomes True with the first training of this call, which --minutes never skips
    folder_of_results = results / "miniature" if miniature else results
    settings = {"data": data or [], "examples": examples}
    wanted = [one for one in KINDS if one in (kind or KINDS)]
    of_seeds = itertools.product(seeds, [one for one in wanted if one != BASE])
    for number, name in [(linear.recipe.seed, BASE)] * (BASE in wanted) + [*of_seeds]:
        is_base = name == BASE
        file = result_file(folder_of_results, f"{linear.results}-{name}", number)
        if is_base:
            folder, recipe = linear.run, linear.recipe
        else:
            folder = linear.out / f"seed{number}" / name
            recipe = continuation(linear.recipe, name, sizes, start_folder(name, linear.out))
            recipe = recipe.override(learning_rate=learning_rate)
        with alone(linear.out / f".{BASE}.lock") if is_base else nullcontext():  # others that want it wait
            if file.exists():
                require_replaceable(file, recipe, settings)
            elif is_base and linear.found:
                evaluate_run(recipe, folder, evaluate, file, settings)
            else:
                if trained and deadline is not None and time.monotonic() > deadline:
                    raise Interrupted(f"stopped before {name} of seed {number}; continue with the same command")
                if not is_base:
                    write_start(name, linear.out, sizes)
                left = None if deadline is None else max((deadline - time.monotonic()) / 60, 1e-9)
                options = Options(seed=number, compile=compile, miniature=miniature, minutes=left, results=results)
                run_name = f"{linear.results}-{name}"
                train_and_evaluate(
                    recipe, folder, evaluate, run_name, options, eval_settings=settings, corpora=texts.of
                )
                trained = True
            if is_base and folder.exists():
                write_linear_start(linear)
    show(folder_of_results, linear.results)


def evaluation(
    base: TrainingRecipe, sizes: Sizes, data: list[str], examples: int
) -> Callable[[LogLinearForCausalLM, TrainingRecipe], dict[str, Any]]:
    """Return the evaluation of a model: needles by length, the bytes of its state, and bits per byte of a text.

    All models answer the same examples. Raises ValueError for a missing tokenizer or text, before any training.
    """
    if base.tokenizer != "bytes" and not Path(base.tokenizer or "").is_dir():
        raise ValueError(f"there is no tokenizer {base.tokenizer}: run `python -m experiments.needle prepare` first")
    tokens = load_tokenizer(base.tokenizer or "bytes")
    documents = [one._replace(text=one.text[:EVAL_CHARACTERS]) for one in read_documents(data)]
    texts = [document.text for document in documents]
    tasks = [task for task in TASKS if texts or task != IN_TEXT]
    sets = example_sets(tokens, texts, lengths=sizes.lengths, count=examples, tasks=tasks)
    corpus = tokenize(documents, tokens) if documents else None

    def evaluate(model: LogLinearForCausalLM, recipe: TrainingRecipe) -> dict[str, Any]:
        measured: dict[str, Any] = {"state_bytes": state_bytes(model.config, sizes.longest)}
        if corpus is not None:
            perplexity = evaluate_perplexity(model, corpus, length=sizes.window, max_tokens=sizes.text)
            measured["perplexity"] = perplexity.to_dict()
        return {**measured, "tasks": evaluate_sets(model, tokens, sets)}

    return evaluate


def show(results: Path, name: str = OWN) -> None:
    """Print the results NAME-KIND.json of all seeds: recall by length, bits per byte and bytes of the state.

    Recall is the mean over the tasks. Each number is the mean over the seeds, with their standard deviation.
    """
    runs = read_seeds(results, name, KINDS)
    lengths = sorted({score["length"] for seeds in runs.values() for score in _scores(seeds[0])})
    columns = ["model", "seeds", *(f"{length:,} tokens" for length in lengths), "bits per byte", "state"]
    rows = []
    for kind, seeds in runs.items():
        recall = [
            [np.mean([score["accuracy"] for score in _scores(one) if score["length"] == length]) for one in seeds]
            for length in lengths
        ]
        texts = [one["evaluation"]["perplexity"]["bits_per_byte"] for one in seeds if "perplexity" in one["evaluation"]]
        size = human_bytes(seeds[0]["evaluation"]["state_bytes"])
        rows.append(
            [
                kind,
                f"{len(seeds)}",
                *(mean_and_deviation(row, 100, 1) for row in recall),
                mean_and_deviation(texts, 1, 4),
                size,
            ]
        )
    print_table("Needles found, in percent", columns, rows)


def _scores(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [score for scores in result["evaluation"]["tasks"].values() for score in scores]


if __name__ == "__main__":
    execute(app, "python -m experiments.upgrade")

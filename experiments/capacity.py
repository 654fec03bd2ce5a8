"""Memorisation: the bits of uniformly random tokens that models of 100 K to 2 M parameters learn by heart.

python -m experiments.capacity run --kind transformer --size 100k --load 1 --out runs/capacity/transformer --minutes 9
python -m experiments.capacity show
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer

from experiments.random_tokens import RandomTokens
from experiments.recipes.capacity import KINDS, LOADS, PREDICTED, SIZES, capacity
from experiments.results import Result, read_seeds
from experiments.runs import Options, Out, program, train_and_evaluate, with_options
from loglinear.cli import execute
from loglinear.cli.console import print_table
from loglinear.data.corpus import Corpus
from loglinear.evaluation import evaluate_perplexity
from loglinear.models import LogLinearForCausalLM
from loglinear.recipes import TrainingRecipe
from loglinear.runs.metrics import read_metrics

PUBLISHED = "3.5 to 3.6 (bfloat16), 3.83 (float32)"  # bits a parameter of GPT-2: Morris et al., arXiv 2505.24832
STILL_LEARNING = 0.02  # share of the memorised bits that the second half of the steps gained
LEAK = 0.05  # bits a token by which held-out tokens may seem less than random

app = program(__doc__)


@app.command()
@with_options
def run(
    kind: Annotated[str, typer.Option(help=f"One of {', '.join(KINDS)}.")],
    size: Annotated[str, typer.Option(help=f"Parameters, one of {', '.join(SIZES)}.")],
    load: Annotated[
        float,
        typer.Option(
            help=f"Bits of the dataset over {PREDICTED} bits a parameter, one of {', '.join(f'{x:g}' for x in LOADS)}."
        ),
    ],
    out: Out,
    *,
    options: Options,
) -> None:
    """Train or resume one model on random tokens, count the bits it knows, and write capacity-KIND-SIZE-LOAD.json.

    Training can stop at any time: the next call resumes it from the last checkpoint. The seed decides the random
    tokens, the first weights and the order of the sequences.

    Example, to repeat until it exits with 0:

    python -m experiments.capacity run --kind transformer --size 100k --load 1 --out runs/capacity/transformer
    --minutes 9
    """

    def evaluate(model: LogLinearForCausalLM, recipe: TrainingRecipe) -> dict[str, Any]:
        return {**measure(model, recipe), "second_half_bits": second_half(recipe, read_metrics(out))}

    recipe = capacity(kind, size, load, miniature=options.miniature)
    train_and_evaluate(recipe, out, evaluate, f"capacity-{kind}-{size}-{load:g}", options, corpora=corpora)


def random_tokens(recipe: TrainingRecipe) -> RandomTokens:
    """Return the sizes of a recipe's data. Raises ValueError if its rows would cut a sequence."""
    data = RandomTokens.from_source(recipe.data[0])
    document = data.length + 1
    if recipe.seq_len != document or recipe.row_tokens % document:
        raise ValueError(
            f"random sequences have {document} tokens: expected --seq-len {document} and a multiple of it as "
            f"--batch-tokens, got {recipe.seq_len} and {recipe.row_tokens}"
        )
    return data


def corpora(recipe: TrainingRecipe) -> tuple[Corpus, Corpus]:
    """Return the random sequences of a recipe and its seed, and the held-out ones."""
    return random_tokens(recipe).corpora(recipe.seed)


def measure(model: Any, recipe: TrainingRecipe) -> dict[str, Any]:
    """Return the bits of the dataset, those that code it under the model, and their difference: the memorised bits.

    Raises ValueError if the model knows anything of the held-out sequences, which it cannot know.
    """
    data, (training, held_out) = random_tokens(recipe), corpora(recipe)
    coded = code_bits(model, training, recipe.row_tokens)
    others = code_bits(model, held_out, recipe.row_tokens) / (len(held_out.names) * data.length)
    random = math.log2(data.vocabulary)
    if others < random - LEAK:
        raise ValueError(
            f"held-out random tokens must take {random:.3f} bits each or more, and take {others:.3f}: the code leaks"
        )
    return {
        "sequences": data.sequences,
        "dataset_bits": data.bits,
        "code_bits": coded,
        "memorised_bits": data.bits - coded,
        "held_out_bits_per_token": others,
    }


def code_bits(model: Any, corpus: Corpus, row_tokens: int) -> float:
    """Return the bits that code a corpus under a model: the sum of -log2 p of all tokens except each document's first.

    The model computes in the dtype of its weights, also where the caller's context has a smaller one.
    """
    length = int(np.diff(corpus.offsets_D).max())
    with torch.autocast(model.device.type, enabled=False):
        losses = evaluate_perplexity(
            model, corpus, length=length, max_tokens=len(corpus.tokens), row_tokens=row_tokens, progress=False
        )
    return float(losses.nats_D.sum()) / math.log(2)


def second_half(recipe: TrainingRecipe, metrics: Iterable[dict[str, Any]]) -> float:
    """Return the bits of the dataset that the second half of the steps gained, from the losses of the training.

    The mean loss over a twentieth of the steps is taken before the middle and before the end. The gain is the
    difference of both, times the tokens of the dataset. The end alone would say little: the learning rate, on its
    cosine, is nearly 0 there.
    """
    losses = [record["bits_per_byte"] for record in metrics if record["split"] == "train"]
    width, middle = math.ceil(len(losses) / 20), math.ceil(len(losses) / 2)
    data = random_tokens(recipe)
    gained = np.mean(losses[middle - width : middle]) - np.mean(losses[-width:])
    return float(gained) * data.sequences * data.length


class Memory(NamedTuple):
    """The memorised bits of models of one kind, size and seed, on datasets of several loads."""

    size: str
    seed: int
    parameters: int
    results: dict[float, Result]
    """The result of each load that was measured."""

    @property
    def memorised(self) -> dict[float, float]:
        """The memorised bits by load."""
        return {load: result["evaluation"]["memorised_bits"] for load, result in self.results.items()}

    @property
    def dataset(self) -> dict[float, float]:
        """The bits of the dataset by load."""
        return {load: result["evaluation"]["dataset_bits"] for load, result in self.results.items()}

    @property
    def capacity(self) -> float | None:
        """The maximum of the memorised bits over all LOADS; None while one of them is missing."""
        return max(self.memorised.values()) if set(self.results) == set(LOADS) else None

    def is_learning(self, load: float) -> bool:
        """Return True if the second half of the steps gained more than STILL_LEARNING of the memorised bits."""
        evaluation = self.results[load]["evaluation"]
        return bool(evaluation["second_half_bits"] > STILL_LEARNING * evaluation["memorised_bits"])


def read_memories(results: Path) -> dict[str, list[Memory]]:
    """Return the measurements of each kind, by size and seed, from capacity-KIND-SIZE-LOAD[-seedSEED].json.

    Raises ValueError, which names the files, if seeds differ in more than the seed.
    """
    memories: dict[str, list[Memory]] = {}
    for kind in KINDS:
        for size in SIZES:
            by_load = {
                load: read_seeds(results, "capacity", [name], data_of_seed=True).get(name, [])
                for load in LOADS
                for name in [f"{kind}-{size}-{load:g}"]
            }
            for seed in sorted({run["seed"] for runs in by_load.values() for run in runs}):
                own = {load: run for load, runs in by_load.items() for run in runs if run["seed"] == seed}
                parameters = next(iter(own.values()))["parameters"]
                memories.setdefault(kind, []).append(Memory(size, seed, parameters, own))
    return memories


def bits_per_parameter(memories: Iterable[Memory]) -> float | None:
    """Return the slope of capacity over parameters, by least squares; None for fewer than two sizes."""
    points = [(one.parameters, one.capacity) for one in memories if one.capacity is not None]
    if len({parameters for parameters, _ in points}) < 2:
        return None
    parameters_P, capacity_P = np.array(points, dtype=float).T
    centred_P = parameters_P - parameters_P.mean()
    return float(centred_P @ capacity_P / (centred_P @ centred_P))


def slopes(memories: Sequence[Memory]) -> tuple[float | None, list[float]]:
    """Return the bits a parameter of all seeds together, and those of each seed that has all sizes with a capacity."""
    of_seed: dict[int, list[Memory]] = {}
    for one in memories:
        if one.capacity is not None:
            of_seed.setdefault(one.seed, []).append(one)
    sizes = {one.size for own in of_seed.values() for one in own}
    slopes_S = [bits_per_parameter(own) for _, own in sorted(of_seed.items()) if {one.size for one in own} == sizes]
    return bits_per_parameter(memories), [slope for slope in slopes_S if slope is not None]


@app.command()
def show(
    results: Annotated[Path, typer.Option(help="Folder of the JSON files of `run`.")] = Path("results"),
) -> None:
    """Print the memorised bits of every kind and size by load, the capacities, and the bits a parameter.

    Numbers of several seeds are their mean. A star marks models that were still learning at the end.

    Example:

    python -m experiments.capacity show
    """
    memories = read_memories(results)
    if not memories:
        raise ValueError(f"--results {results} has no result of `python -m experiments.capacity run`")
    loads = [f"load {load:g}" for load in LOADS]
    columns = ["kind", "size", "parameters", "seeds", *loads, "capacity", "bits a parameter"]
    rows = [
        _row(kind, [one for one in own if one.size == size])
        for kind, own in memories.items()
        for size in SIZES
        if any(one.size == size for one in own)
    ]
    print_table("Memorised, in thousands of bits (*: still learning)", columns, rows)
    slopes_of = {kind: slopes(own) for kind, own in memories.items()}
    print_table(
        "Bits a parameter: the slope of capacity over parameters",
        ["kind", "all seeds", "range over seeds", "seeds", "published for GPT-2"],
        [
            [kind, _number(slope), _range(seeds), f"{len(seeds)}", PUBLISHED]
            for kind, (slope, seeds) in slopes_of.items()
        ],
    )


def _row(kind: str, seeds: Sequence[Memory]) -> list[str]:
    """Return the cells of one kind and size."""
    cells = []
    for load in LOADS:
        runs = [one for one in seeds if load in one.results]
        mean = _mean([one.memorised[load] / 1000 for one in runs])
        cells.append(_number(mean, ",.1f") + "*" * any(one.is_learning(load) for one in runs))
    capacity = _mean([one.capacity for one in seeds if one.capacity is not None])
    parameters = seeds[0].parameters
    of_each = None if capacity is None else capacity / parameters
    thousands = None if capacity is None else capacity / 1000
    return [
        kind,
        seeds[0].size,
        f"{parameters:,}",
        f"{len(seeds)}",
        *cells,
        _number(thousands, ",.1f"),
        _number(of_each),
    ]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _number(value: float | None, digits: str = ".2f") -> str:
    return "-" if value is None else f"{value:{digits}}"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if values else "-"


if __name__ == "__main__":
    execute(app, "python -m experiments.capacity")

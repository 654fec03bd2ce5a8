"""Memorisation: the bits of uniformly random tokens that models of 100 K to 2 M parameters learn by heart.

python -m experiments.capacity run --kind transformer --size 100k --load 1 --out runs/capacity/transformer --minutes 9
python -m experiments.capacity show
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer

from experiments.random_tokens import RandomTokens
from experiments.recipes.capacity import KINDS, LOADS, PREDICTED, SIZES, capacity
from experiments.results import Result, read_seeds, require_some
from experiments.runs import Options, Out, program, train_and_evaluate, with_options
from loglinear.cli import execute
from loglinear.cli.console import NOTHING, print_table
from loglinear.data.corpus import Corpus
from loglinear.evaluation import evaluate_perplexity
from loglinear.models import LogLinearForCausalLM
from loglinear.recipes import TrainingRecipe
from loglinear.recipes.recipe import DTYPES
from loglinear.runs.metrics import read_metrics

PUBLISHED = {"float32": "3.83", "bfloat16": "3.51"}  # bits a parameter of GPT-2: Morris et al., arXiv 2505.24832
STILL_LEARNING = 0.02  # share of the memorised bits that the second half of the steps gained
PLATEAU = 0.05  # a capacity is known if the largest dataset adds at most this share of the memorised bits
LEAK = 0.05  # bits a token by which held-out tokens may seem less than random

Dtype = Annotated[
    str | None,
    typer.Option(
        help=f"Dtype in which the training multiplies, one of {', '.join(DTYPES)}; weights are float32.",
        show_default="bfloat16 on a GPU that has it, else float32",
    ),
]

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
    dtype: Dtype = None,
    *,
    options: Options,
) -> None:
    """Train or resume one model on random tokens, count the bits it knows, and write the result.

    The result is capacity-KIND-SIZE-LOAD-DTYPE.json. Training can stop at any time: the next call resumes it from the
    last checkpoint. The seed decides the random tokens, the first weights and the order of the sequences. On a GPU the
    forward and backward pass of a step is one CUDA graph, so many processes can share the GPU.

    Example, to repeat until it exits with 0:

    python -m experiments.capacity run --kind transformer --size 100k --load 1 --out runs/capacity/transformer
    --minutes 9
    """

    def evaluate(model: LogLinearForCausalLM, recipe: TrainingRecipe) -> dict[str, Any]:
        return {**measure(model, recipe), "second_half_bits": second_half(recipe, read_metrics(out))}

    dtype = dtype or default_dtype()
    recipe = capacity(kind, size, load, dtype=dtype, miniature=options.miniature)
    name = f"capacity-{kind}-{size}-{load:g}-{dtype}"
    train_and_evaluate(recipe, out, evaluate, name, options, corpora=corpora, equal_rows=True)


def default_dtype() -> str:
    """Return the dtype in which a training multiplies here: bfloat16 on a GPU that has it, else float32."""
    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"


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
    coded = float(code_bits(model, training, recipe.row_tokens).sum())
    others = float(code_bits(model, held_out, recipe.row_tokens).mean()) / data.length
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


def code_bits(model: Any, corpus: Corpus, row_tokens: int) -> np.ndarray:
    """Return the bits that code each document under a model: the sum of -log2 p of all its tokens except the first.

    The model computes in the dtype of its weights, also where the caller's context has a smaller one.
    """
    length = int(np.diff(corpus.offsets_D).max())
    with torch.autocast(model.device.type, enabled=False):
        losses = evaluate_perplexity(
            model, corpus, length=length, max_tokens=len(corpus.tokens), row_tokens=row_tokens, progress=False
        )
    return losses.nats_D / math.log(2)


def second_half(recipe: TrainingRecipe, metrics: Iterable[dict[str, Any]]) -> float:
    """Return the bits of the dataset that the second half of the steps gained, from the losses of the training.

    Two means are each over a twentieth of the steps, before the middle and before the end. The gain is the difference
    of these means, times the tokens of the dataset. The last steps alone would say little, because the learning rate
    falls on a cosine and is nearly 0 there.
    """
    losses = [record["bits_per_byte"] for record in metrics if record["split"] == "train"]
    width, middle = math.ceil(len(losses) / 20), math.ceil(len(losses) / 2)
    data = random_tokens(recipe)
    gained = np.mean(losses[middle - width : middle]) - np.mean(losses[-width:])
    return float(gained) * data.sequences * data.length


class Series(NamedTuple):
    """A kind of model and its dtype. One slope, the bits a parameter, is fitted to all their sizes."""

    kind: str
    dtype: str


class Memory(NamedTuple):
    """The memorised bits of models of one series, size and seed, on datasets of several loads."""

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
        """The maximum of the memorised bits over the loads, if more data adds hardly anything.

        None if there is one load alone, or if the largest dataset adds more than PLATEAU to the maximum of the smaller
        ones.
        """
        *smaller, largest = (self.memorised[load] for load in sorted(self.results))
        return max(*smaller, largest) if smaller and largest <= (1 + PLATEAU) * max(smaller) else None

    def is_learning(self, load: float) -> bool:
        """Return True if the second half of the steps gained more than STILL_LEARNING of the memorised bits."""
        evaluation = self.results[load]["evaluation"]
        return bool(evaluation["second_half_bits"] > STILL_LEARNING * evaluation["memorised_bits"])


def read_memories(results: Path) -> dict[Series, list[Memory]]:
    """Return the measurements of each series, by size and seed, from capacity-KIND-SIZE-LOAD-DTYPE[-seedSEED].json.

    Raises ValueError, which names the files, if seeds differ in more than the seed.
    """
    memories: dict[Series, list[Memory]] = {}
    for series in itertools.starmap(Series, itertools.product(KINDS, DTYPES)):
        for size in SIZES:
            by_load = {
                load: read_seeds(results, "capacity", [name], data_of_seed=True).get(name, [])
                for load in LOADS
                for name in [f"{series.kind}-{size}-{load:g}-{series.dtype}"]
            }
            for seed in sorted({run["seed"] for runs in by_load.values() for run in runs}):
                own = {load: run for load, runs in by_load.items() for run in runs if run["seed"] == seed}
                parameters = next(iter(own.values()))["parameters"]
                memories.setdefault(series, []).append(Memory(size, seed, parameters, own))
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

    Numbers of several seeds are their mean. A star marks models that were still learning at the end. A line names each
    kind whose bits a parameter are not known yet, and says why.

    Example:

    python -m experiments.capacity show
    """
    memories = require_some(read_memories(results), results, "capacity")
    loads = [f"load {load:g}" for load in LOADS]
    columns = ["kind", "dtype", "size", "parameters", "seeds", *loads, "capacity", "bits a parameter"]
    rows = [
        [*series, *_row([one for one in own if one.size == size])]
        for series, own in memories.items()
        for size in SIZES
        if any(one.size == size for one in own)
    ]
    print_table("Memorised, in thousands of bits (*: still learning)", columns, rows)
    slopes_of = {series: slopes(own) for series, own in memories.items()}
    known = [
        [*series, _number(slope), _range(seeds), f"{len(seeds)}", PUBLISHED[series.dtype]]
        for series, (slope, seeds) in slopes_of.items()
        if slope is not None
    ]
    if known:
        columns = ["kind", "dtype", "all seeds", "range over seeds", "seeds", "published for GPT-2"]
        print_table("Bits a parameter: the slope of capacity over parameters", columns, known)
    for series, (slope, _) in slopes_of.items():
        if slope is None:
            print(without_slope(series, memories[series]))


def without_slope(series: Series, memories: Sequence[Memory]) -> str:
    """Return a line that says why a series has no bits a parameter."""
    sizes = {one.size for one in memories}
    known = {one.size for one in memories if one.capacity is not None}
    return (
        f"{series.kind}, {series.dtype}: no slope, which needs 2 sizes with a capacity: {len(known)} of {len(sizes)} "
        f"measured sizes have one. A capacity needs 2 loads, the largest of which adds at most {100 * PLATEAU:g} %."
    )


def _row(seeds: Sequence[Memory]) -> list[str]:
    """Return the cells of one series and size."""
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
    return NOTHING if value is None else f"{value:{digits}}"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if values else NOTHING


if __name__ == "__main__":
    execute(app, "python -m experiments.capacity")

"""Double descent: memorised bits, test loss and membership of small models, over the size of a dataset of real text.

python -m experiments.descent reference --kind transformer --out runs/descent/transformer-reference --minutes 9
python -m experiments.descent run --kind transformer --load 1 --reference runs/descent/transformer-reference
    --out runs/descent/transformer-1 --minutes 9
python -m experiments.descent show
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer

from experiments.capacity import Dtype, code_bits, default_dtype
from experiments.membership_law import COLUMNS, Law, fit_law, matched_f1
from experiments.recipes.capacity import KINDS
from experiments.recipes.descent import DATA, LOADS, descent
from experiments.results import Result, read_results, require_some, seed_suffix
from experiments.runs import Options, Out, program, train_and_evaluate, with_options
from experiments.text_pieces import TextPieces, documents_of
from loglinear.cli import execute
from loglinear.cli.console import print_table
from loglinear.data.corpus import Corpus
from loglinear.evaluation import evaluate_membership
from loglinear.models import ByteTokenizer, LogLinearForCausalLM
from loglinear.recipes import TrainingRecipe
from loglinear.recipes.recipe import DTYPES
from loglinear.runs.checkpoints import last_checkpoint, step_of
from loglinear.runs.folder import run_recipe
from loglinear.training import load_model

MEMBERS = 1024  # pieces of a dataset that the attacks get, as many as there are held-out pieces

app = program(__doc__)
KindOfModel = Annotated[str, typer.Option(help=f"One of {', '.join(KINDS)}.")]
Text = Annotated[
    str | None,
    typer.Option(help="Source of the text.", show_default=f"{DATA}, or stdlib for a miniature"),
]


@app.command()
@with_options
def reference(kind: KindOfModel, out: Out, data: Text = None, dtype: Dtype = None, *, options: Options) -> None:
    """Train or resume a model on pieces that no other model reads, and write descent-KIND-reference-DTYPE.json.

    This model knows the language, but no piece of any dataset. The bits of a dataset are its code length under this
    model.

    Example:

    python -m experiments.descent reference --kind transformer --out runs/descent/transformer-reference --minutes 9
    """
    dtype = dtype or default_dtype()
    recipe = descent(kind, None, data=_text(data, options), dtype=dtype, miniature=options.miniature)

    def evaluate(model: LogLinearForCausalLM, recipe: TrainingRecipe) -> dict[str, Any]:
        return {"test_bits_per_byte": bits_per_byte(model, pieces_of(recipe).held_out(), recipe)}

    name = f"descent-{kind}-reference-{dtype}"
    train_and_evaluate(recipe, out, evaluate, name, options, corpora=_reference_corpora, equal_rows=True)


@app.command()
@with_options
def run(
    kind: KindOfModel,
    load: Annotated[
        float,
        typer.Option(help=f"Estimated bits of the dataset over the capacity: {', '.join(f'{x:g}' for x in LOADS)}."),
    ],
    reference: Annotated[Path, typer.Option(help="Folder of the finished run of `reference`.")],
    out: Out,
    data: Text = None,
    dtype: Dtype = None,
    *,
    options: Options,
) -> None:
    """Train or resume one model on pieces of text, count the bits it knows, and write descent-KIND-LOAD-DTYPE.json.

    Training can stop at any time: the next call resumes it from the last checkpoint. The seed decides the pieces, the
    first weights and the order of the pieces.

    Example:

    python -m experiments.descent run --kind transformer --load 1 --reference runs/descent/transformer-reference
    --out runs/descent/transformer-1 --minutes 9
    """
    dtype = dtype or default_dtype()
    given: dict[str, Any] = dict(data=_text(data, options), dtype=dtype, miniature=options.miniature)
    recipe, expected = descent(kind, load, **given), descent(kind, None, **given)
    require_reference(reference, expected)

    def evaluate(model: LogLinearForCausalLM, recipe: TrainingRecipe) -> dict[str, Any]:
        return measure(model, load_model(reference, device=str(model.device)), recipe)

    name = f"descent-{kind}-{load:g}-{dtype}"
    train_and_evaluate(recipe, out, evaluate, name, options, corpora=corpora, equal_rows=True)


def _text(data: str | None, options: Options) -> str:
    return data or ("stdlib" if options.miniature else DATA)


def pieces_of(recipe: TrainingRecipe) -> TextPieces:
    """Return the pieces of text of a recipe: their number, their length and their source."""
    return TextPieces.from_source(recipe.data[0])


def corpora(recipe: TrainingRecipe) -> tuple[Corpus, Corpus]:
    """Return the pieces of a recipe and its seed, and the held-out ones."""
    return pieces_of(recipe).corpora(recipe.seed)


def _reference_corpora(recipe: TrainingRecipe) -> tuple[Corpus, Corpus]:
    return pieces_of(recipe).reference_corpora()


def require_reference(folder: Path, expected: TrainingRecipe) -> None:
    """Raise ValueError unless `folder` holds a finished run of the expected recipe. Seed and steps may differ."""
    found = run_recipe(folder, "--reference")
    if found.name != expected.name:
        raise ValueError(f"--reference {folder} holds a run of {found.name}, expected {expected.name}")
    if found.data != expected.data:
        raise ValueError(f"--reference {folder} is of other text: of {found.data[0]}, expected {expected.data[0]}")
    checkpoint = last_checkpoint(folder)
    step = 0 if checkpoint is None else step_of(checkpoint)
    if step < found.steps:
        raise ValueError(f"--reference {folder} is at step {step} of {found.steps}: finish it with `reference`")


def bits_per_byte(model: Any, corpus: Corpus, recipe: TrainingRecipe) -> float:
    """Return the bits that code a byte of a corpus under a model."""
    return float(code_bits(model, corpus, recipe.row_tokens).sum() / corpus.bytes_D.sum())


def measure(model: Any, reference: Any, recipe: TrainingRecipe) -> dict[str, Any]:
    """Return the bits of the dataset, the memorised bits, the test loss, and the results of the attacks.

        bits of the dataset = sum over its pieces x of r(x)
        memorised bits      = sum over its pieces x of max(0, r(x) - m(x))

    m(x) and r(x) are the bits that code x under the model and under the reference. The attacks tell MEMBERS pieces of
    the dataset, or all if there are fewer, from equally many held-out pieces. A low score speaks for a member.

    Source: Morris et al., arXiv 2505.24832, equations of unintended memorisation.
    """
    training, held_out = corpora(recipe)
    own_N = code_bits(model, training, recipe.row_tokens)
    reference_N = code_bits(reference, training, recipe.row_tokens)
    members, others = (documents_of(part, name) for part, name in ((training, "member"), (held_out, "other")))
    count = min(MEMBERS, len(members), len(others))  # of both, so that chance is an F1 of 1/2
    tokenizer = ByteTokenizer()
    with torch.autocast(model.device.type, enabled=False):
        attacks = evaluate_membership(
            model, tokenizer, members[:count], others[:count], reference=(reference, tokenizer), progress=False
        )
    return {
        "pieces": len(training.names),
        "dataset_bits": float(reference_N.sum()),
        "code_bits": float(own_N.sum()),
        "memorised_bits": float(np.maximum(0, reference_N - own_N).sum()),
        "training_bits_per_byte": float(own_N.sum() / training.bytes_D.sum()),
        "test_bits_per_byte": bits_per_byte(model, held_out, recipe),
        "reference_test_bits_per_byte": bits_per_byte(reference, held_out, recipe),
        "membership": {
            name: {**score, "matched_f1": matched_f1(attacks.curves[name])} for name, score in attacks.summary().items()
        },
    }


class Descent(NamedTuple):
    """The results of one kind, dtype and seed by load, in the order of LOADS."""

    kind: str
    dtype: str
    seed: int
    results: dict[float, Result]

    def values(self, name: str) -> np.ndarray:
        """Return a number of every result's evaluation."""
        return np.array([result["evaluation"][name] for result in self.results.values()])

    @property
    def capacity(self) -> float:
        """The maximum of the memorised bits over the loads that were measured."""
        return float(self.values("memorised_bits").max())

    @property
    def ratio(self) -> np.ndarray:
        """The bits of the dataset over the capacity, for each load."""
        return self.values("dataset_bits") / self.capacity

    def scores(self, attack: str, name: str = "matched_f1") -> np.ndarray:
        """Return a number of an attack for each load."""
        return np.array([result["evaluation"]["membership"][attack][name] for result in self.results.values()])

    def law(self, attack: str) -> Law | None:
        """Return the law of an attack's matched F1 over the capacity per piece; None for fewer than four loads."""
        if len(self.results) < 4:
            return None
        return fit_law(self.capacity / self.values("pieces"), self.scores(attack))


ATTACKS = ("loss", "zlib_ratio", "min_k", "reference")


def read_descents(results: Path) -> list[Descent]:
    """Return the results of every kind, dtype and seed from descent-KIND-LOAD-DTYPE[-seedSEED].json."""
    found = []
    for kind in KINDS:
        for dtype in DTYPES:
            files = results.glob(f"descent-{kind}-*-{dtype}-seed*.json")
            seeds = {0, *(int(file.stem.rpartition("-seed")[2]) for file in files)}
            for seed in sorted(seeds):
                names = {f"{kind}-{load:g}-{dtype}{seed_suffix(seed)}": load for load in LOADS}
                own = read_results(results, "descent", names)
                if own:
                    found.append(Descent(kind, dtype, seed, {names[name]: result for name, result in own.items()}))
    return found


@app.command()
def show(
    results: Annotated[Path, typer.Option(help="Folder of the JSON files of `run`.")] = Path("results"),
) -> None:
    """Print memorised bits, test loss and the matched F1 of every attack by load, and the laws of membership.

    Example:

    python -m experiments.descent show
    """
    descents = require_some(read_descents(results), results, "descent")
    columns = ["kind", "dtype", "seed", "load", "dataset / capacity", "memorised, kbit", "test bits a byte", *ATTACKS]
    print_table(
        "Pieces of text (the last columns: matched F1)", columns, [row for one in descents for row in _rows(one)]
    )
    laws = [(one, attack, one.law(attack)) for one in descents for attack in ATTACKS]
    fitted = [
        [one.kind, one.dtype, f"{one.seed}", attack, *law.cells()] for one, attack, law in laws if law is not None
    ]
    if fitted:
        columns = ["kind", "dtype", "seed", "attack", *COLUMNS]
        print_table("F1 = (1 + c1 sigmoid(c2 (capacity / pieces + c3))) / 2", columns, fitted)


def _rows(one: Descent) -> list[list[str]]:
    numbers = zip(
        one.results,
        one.ratio,
        one.values("memorised_bits") / 1000,
        one.values("test_bits_per_byte"),
        *(one.scores(attack) for attack in ATTACKS),
        strict=True,
    )
    names = [one.kind, one.dtype, f"{one.seed}"]
    return [
        [*names, f"{load:g}", f"{ratio:.2f}", f"{memorised:,.1f}", *(f"{value:.3f}" for value in rest)]
        for load, ratio, memorised, *rest in numbers
    ]


if __name__ == "__main__":
    execute(app, "python -m experiments.descent")

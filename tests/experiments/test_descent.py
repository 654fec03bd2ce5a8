"""Double descent in miniature: pieces of text, memorised bits against a reference, points of a law, and a figure."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments import descent, text_pieces
from experiments.figures.descent import conclusion
from experiments.figures.descent import descent as figure
from experiments.membership_law import Law
from experiments.recipes import descent as recipes
from experiments.recipes.capacity import KINDS
from experiments.recipes.comparison import WIDTH_STEP
from experiments.results import result_file
from experiments.text_pieces import TextPieces
from loglinear.cli.console import Interrupted
from loglinear.models import parameter_counts
from loglinear.runs.folder import write_run
from loglinear.runs.json_files import read_object, write_object


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Random words in lines, some twice, and some that are not ASCII."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("text")
    words = ["".join(chr(97 + letter) for letter in rng.integers(26, size=5)) for _ in range(300)]
    for number in range(6):
        lines = [" ".join(rng.choice(words, 6)) for _ in range(2000)]
        (folder / f"{number}.txt").write_text("\n".join([*lines, *lines[:50], "é" * 40]))
    return str(folder)


def texts_of(corpus):
    return [document.text for document in text_pieces.documents_of(corpus, "a")]


def test_pieces_are_different_texts_of_one_length_and_no_two_models_share_one(text):
    data = TextPieces(50, 32, 100, text)
    (training, held_out), (reserved, again) = data.corpora(3), data.reference_corpora()
    sets = [set(texts_of(corpus)) for corpus in (training, held_out, reserved)]
    assert [len(one) for one in sets] == [50, text_pieces.HELD_OUT, 100]
    assert len(set.union(*sets)) == sum(map(len, sets)) and texts_of(again) == texts_of(held_out)
    assert all(len(piece) == 32 and piece.isascii() for one in sets for piece in one)
    assert texts_of(data._replace(sequences=80).corpora(3)[0])[:50] == texts_of(training)
    assert texts_of(data.corpora(4)[0]) != texts_of(training)
    assert TextPieces.from_source(data.source) == data
    with pytest.raises(ValueError, match="expected pieces of text as pieces:SEQUENCES:LENGTH:RESERVED:TEXT, got 'a:b'"):
        TextPieces.from_source("a:b")


def test_a_text_without_enough_pieces_is_named(text):
    with pytest.raises(ValueError, match="different pieces of 32 bytes beside the reserved ones, expected 1,000,000"):
        TextPieces(1_000_000, 32, 100, text).corpora(0)
    with pytest.raises(ValueError, match="expected more than 1,024 held-out and 1,000,000 reserved ones"):
        TextPieces(1, 32, 1_000_000, text).held_out()


@pytest.mark.parametrize("miniature", [False, True])
def test_kinds_have_equal_parameters_and_data(miniature):
    made = [recipes.descent(kind, 2.0, data="stdlib", miniature=miniature) for kind in KINDS]
    totals = [parameter_counts(recipe.model_config()).total for recipe in made]
    model = made[0].model
    step = 3 * model["hidden_size"] * model["num_hidden_layers"] * WIDTH_STEP  # parameters
    assert max(totals) - min(totals) <= step < 0.06 * min(totals)
    assert len({recipe.data for recipe in made}) == 1
    with pytest.raises(ValueError, match="--kind must be one of transformer, .* got 'other'"):
        recipes.descent("other", 1.0, data="stdlib")
    with pytest.raises(ValueError, match=r"--load must be one of 0.25, .* got 3"):
        recipes.descent("linear", 3, data="stdlib")


def test_memorised_bits_are_those_that_the_model_saves_against_the_reference(monkeypatch, text):
    """A piece that the model codes worse than the reference counts as 0."""
    recipe = recipes.descent("linear", 0.25, data=text, miniature=True)
    recipe = recipe.override(data=(TextPieces(8, 32, 100, text).source,))
    bits = {"model": np.array([10.0, 50, 90, 20, 30, 40, 7, 8]), "reference": np.full(8, 40.0)}

    def code_bits(model, corpus, row_tokens):
        return bits[model.name] if len(corpus.names) == 8 else np.full(len(corpus.names), 96.0)

    monkeypatch.setattr(descent, "code_bits", code_bits)
    attacks = SimpleNamespace(curves={}, summary=dict)
    monkeypatch.setattr(descent, "evaluate_membership", lambda *args, **options: attacks)
    model, reference = (SimpleNamespace(name=name, device=torch.device("cpu")) for name in bits)
    found = descent.measure(model, reference, recipe)
    assert found["memorised_bits"] == 30 + 20 + 10 + 33 + 32 and found["dataset_bits"] == 320
    assert found["code_bits"] == 255 and found["test_bits_per_byte"] == 3 and found["pieces"] == 8


@pytest.mark.parametrize("pieces", [8, 1500])
def test_attacks_read_as_many_members_as_others(monkeypatch, text, pieces):
    """Otherwise chance is no F1 of 1/2, and the law would not hold for any model."""
    recipe = recipes.descent("linear", 0.25, data=text, miniature=True)
    recipe = recipe.override(data=(TextPieces(pieces, 32, 100, text).source,))
    asked = []

    def attack(model, tokenizer, members, others, **options):
        asked.append(([one.text for one in members], [one.text for one in others]))
        return SimpleNamespace(curves={}, summary=dict)

    monkeypatch.setattr(descent, "code_bits", lambda model, corpus, row_tokens: np.ones(len(corpus.names)))
    monkeypatch.setattr(descent, "evaluate_membership", attack)
    model = SimpleNamespace(device=torch.device("cpu"))
    descent.measure(model, model, recipe)
    ((members, others),) = asked
    training, held_out = (texts_of(corpus) for corpus in descent.corpora(recipe))
    count = min(pieces, text_pieces.HELD_OUT)
    assert members == training[:count] and others == held_out[:count]


def options(folder, steps):
    return vars(descent.Options(miniature=True, results=folder, steps=steps))


def test_a_miniature_measures_memory_and_membership_and_pieces_give_what_one_call_gives(tmp_path, text):
    reference = tmp_path / "reference"
    descent.reference("linear", reference, text, **options(tmp_path, 5))

    def run(out, minutes=None, steps=20):
        given = {**options(tmp_path / out, steps), "minutes": minutes}
        descent.run("linear", 0.25, reference, tmp_path / out / "run", text, **given)
        return read_object(result_file(tmp_path / out / "miniature", "descent-linear-0.25-float32", 0))

    whole = run("whole")
    with pytest.raises(Interrupted, match="stopped at step 1 of 20"):
        run("pieces", minutes=1e-9)
    assert run("pieces")["evaluation"] == whole["evaluation"]
    evaluation = whole["evaluation"]
    assert 0 < evaluation["memorised_bits"] < evaluation["dataset_bits"]
    assert evaluation["training_bits_per_byte"] < evaluation["test_bits_per_byte"]
    assert set(evaluation["membership"]) == set(descent.ATTACKS)
    assert all(0 <= score["matched_f1"] <= score["best_f1"] for score in evaluation["membership"].values())


def recipe_of(load=None, kind="linear", **given):
    return recipes.descent(kind, load, **{"data": "stdlib", "miniature": True, **given})


def test_only_the_finished_run_of_the_same_reference_is_taken(tmp_path, monkeypatch):
    recipe = recipe_of()
    with pytest.raises(ValueError, match="--reference .*/nothing does not exist, expected the folder of a training"):
        descent.require_reference(tmp_path / "nothing", recipe)
    write_run(tmp_path, recipe, {}, parameters=1, model=recipe.model_config())
    with pytest.raises(ValueError, match="is at step 0 of 60: finish it with `reference`"):
        descent.require_reference(tmp_path, recipe)
    monkeypatch.setattr(descent, "last_checkpoint", lambda folder: folder / "checkpoint-60")
    descent.require_reference(tmp_path, recipe)
    for other in (recipe_of(kind="routed"), recipe_of(dtype="bfloat16"), recipe_of(miniature=False), recipe_of(1.0)):
        with pytest.raises(ValueError, match=f"{recipe.name}, expected {other.name}$"):
            descent.require_reference(tmp_path, other)
    with pytest.raises(ValueError, match="is of other text: of pieces:.*:stdlib, expected pieces:2048:32:2048:books$"):
        descent.require_reference(tmp_path, recipe_of(data="books"))


LAW = Law(0.95, 0.06, -40.0)


def write(folder, kind="transformer", seed=0, loads=recipes.LOADS, dtype="bfloat16"):
    """Write made-up results: a capacity of 100 kbit, the largest test loss at load 1, and F1 on LAW."""
    for load in loads:
        pieces = round(1000 * load)
        score = {"matched_f1": float(LAW(100_000 / pieces)), "auc": 0.5}
        evaluation = {
            **dict(pieces=pieces, dataset_bits=100_000 * load, memorised_bits=100_000 * min(1.0, load)),
            **dict(test_bits_per_byte=3 - abs(np.log2(load)) / 8, membership=dict.fromkeys(descent.ATTACKS, score)),
        }
        result = {
            **dict(seed=seed, parameters=1000, versions={}, recipe={}, training={}, evaluation=evaluation),
        }
        write_object(result_file(folder, f"descent-{kind}-{load:g}-{dtype}", seed), result)


def test_the_tables_have_ratios_scores_and_laws(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(ValueError, match="has no result of `python -m experiments.descent run`"):
        descent.show(tmp_path)
    write(tmp_path)
    write(tmp_path, "routed", seed=2, loads=[0.5, 2.0])
    descent.show(tmp_path)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in rows if row]
    assert len(rows) == 7 + 2 + 4  # two loads are too few for a law
    assert rows[2][:7] == ["transformer", "bfloat16", "0", "1", "1.00", "100.0", "3.000"]
    assert rows[7][:6] == ["routed", "bfloat16", "2", "0.5", "0.50", "50.0"]
    assert rows[-1] == ["transformer", "bfloat16", "0", "reference", "0.950", "0.06", "-40", f"{LAW(0):.3f}", "0.000"]


def test_the_figure_says_where_the_test_loss_is_largest(tmp_path):
    assert figure(tmp_path, tmp_path) == []
    write(tmp_path)
    write(tmp_path, "routed", seed=2, loads=[0.5, 2.0])
    title = conclusion(descent.read_descents(tmp_path)).splitlines()
    assert title[0].endswith("test loss is largest where the dataset has 1.0 times the memorised bits")
    assert title[0].startswith("Transformer, bfloat16:") and title[1].startswith("routed Mamba-2, bfloat16, seed 2:")
    files = figure(tmp_path, tmp_path)
    assert [file.name for file in files] == ["descent.svg", "descent-dark.svg"]
    assert all(line in files[0].read_text() for line in title)

"""The needle experiment on a tiny model: trained in pieces as if in one, evaluated once."""

import contextlib
from pathlib import Path

import pytest

from experiments import needle
from experiments.recipes.needle import VOCABULARY
from loglinear.cli.console import Interrupted
from loglinear.data.needle_documents import needle_documents
from loglinear.data.needles import Needle
from loglinear.data.tokenizer import load_tokenizer
from loglinear.evaluation.needle import IN_TEXT, TASKS
from loglinear.models import ByteTokenizer
from loglinear.runs.folder import write_run
from loglinear.runs.json_files import read_object, write_object
from loglinear.runs.metrics import append_metrics
from tests.data.test_needle_documents import PROSE
from tests.training.tiny import tiny_recipe


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The files of `run`: a model trained in three calls, the same in one, and another seed's without a text."""
    folder = tmp_path_factory.mktemp("needle")
    (folder / "prose.txt").write_text(PROSE)
    ByteTokenizer().save_pretrained(folder / "bytes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(needle, "LENGTHS", (1100, 900))
        patch.setattr(
            needle,
            "kind_recipe",
            lambda name, kind, miniature: tiny_recipe(
                Path("needle:20:600"), name=f"{name}_{kind}", seq_len=600, batch_tokens=1200, eval_tokens=1200
            ),
        )
        call = {
            "kind": "capped",
            "tokenizer": folder / "bytes",
            "examples": 3,
            "steps": 3,
            "data": [str(folder / "prose.txt")],
        }
        pieces = {**call, "out": folder / "pieces", "results": folder / "results"}
        for step in (1, 2):
            with pytest.raises(Interrupted, match=f"stopped at step {step} of 3"):
                needle.run(**pieces, minutes=1e-9)
        assert not list(pieces["results"].rglob("*.json"))
        needle.run(**pieces)
        needle.run(**call, out=folder / "whole", results=folder / "whole")
        needle.run(**{**call, "data": None}, out=folder / "other", results=folder / "results", seed=1)
        with pytest.raises(ValueError, match="holds a run of needle_capped, expected needle_linear"):
            needle.run(**{**pieces, "kind": "linear"})
    assert {path.name for path in pieces["results"].iterdir()} == {"needle-capped.json", "needle-capped-seed1.json"}
    names = ("results/needle-capped", "whole/needle-capped", "results/needle-capped-seed1")
    return [read_object(folder / f"{name}.json") for name in names]


def test_pieces_give_what_one_call_gives(results):
    pieces, whole, _ = results
    assert pieces["training"]["curve"] == whole["training"]["curve"]
    assert pieces["evaluation"] == whole["evaluation"]


def test_every_task_is_asked_at_every_length(results):
    *_, other = results
    for result, tasks in ((results[0], set(TASKS)), (other, set(TASKS) - {IN_TEXT})):
        found = result["evaluation"]["tasks"]
        assert set(found) == tasks
        for task, scores in found.items():
            assert [score["length"] for score in scores] == [900, 1100]
            values = TASKS[task].asked * TASKS[task].values
            assert [sum(part["values"] for part in score["by_depth"]) for score in scores] == [3 * values] * 2


def test_result_says_what_it_cost_and_what_it_depends_on(results):
    result, _, other = results
    assert (result["seed"], other["seed"]) == (0, 1) and result["parameters"] > 0 and result["versions"]["device"]
    assert result["training"]["tokens"] == 3 * 1200 and result["training"]["minutes"] > 0
    assert len(result["evaluation"]["data"]) == 1 and other["evaluation"]["data"] == []


def test_a_text_that_is_missing_is_known_before_training(tmp_path):
    ByteTokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a file, a folder nor a glob"):
        needle.run("linear", tmp_path / "run", data=[str(tmp_path / "none.txt")], tokenizer=tmp_path)
    assert not (tmp_path / "run").exists()


def test_mistakes_are_known_before_the_text_is_read(tmp_path, monkeypatch):
    ByteTokenizer().save_pretrained(tmp_path / "bytes")
    recipe = tiny_recipe(Path("needle:20:600"), name="needle_linear", seq_len=600, batch_tokens=1200, steps=1)
    monkeypatch.setattr(needle, "kind_recipe", lambda *_: recipe)
    monkeypatch.setattr(needle, "LENGTHS", (900,))
    monkeypatch.setattr(needle, "tokens_of", lambda *_: pytest.fail("the text was read"))
    (tmp_path / "file").write_text("")
    for options in (dict(results=tmp_path / "file"), dict(results=tmp_path, seq_len=1)):
        with pytest.raises(ValueError, match="--results must be a folder|seq_len must be at least 2"):
            needle.run("linear", tmp_path / "run", tokenizer=tmp_path / "bytes", examples=1, **options)


def test_a_run_keeps_its_own_text(tmp_path, monkeypatch):
    """The sources of a recipe may change while a run of it is stopped."""
    ByteTokenizer().save_pretrained(tmp_path / "bytes")
    monkeypatch.setattr(needle, "LENGTHS", (900,))
    common = dict(tokenizer=tmp_path / "bytes", results=tmp_path / "results", examples=1)
    for source, minutes in (("needle:20:600", 1e-9), ("needle:30:600", None)):
        recipe = tiny_recipe(Path(source), name="needle_linear", seq_len=600, batch_tokens=1200, steps=2)
        monkeypatch.setattr(needle, "kind_recipe", lambda *_, recipe=recipe: recipe)
        with contextlib.suppress(Interrupted):
            needle.run("linear", tmp_path / "run", **common, minutes=minutes)
    assert read_object(tmp_path / "results" / "needle-linear.json")["recipe"]["data"] == ["needle:20:600"]


def test_another_number_of_levels_is_a_result_of_its_own(tmp_path, monkeypatch):
    ByteTokenizer().save_pretrained(tmp_path / "bytes")
    recipe = tiny_recipe(Path("needle:20:600"), name="needle_log_linear", seq_len=600, batch_tokens=1200, steps=1)
    monkeypatch.setattr(needle, "kind_recipe", lambda *_: recipe)
    monkeypatch.setattr(needle, "LENGTHS", (900,))
    common = dict(tokenizer=tmp_path / "bytes", results=tmp_path, examples=1, levels=4)
    needle.run("log_linear", tmp_path / "run", **common)
    assert read_object(tmp_path / "needle-log_linear-levels4.json")["recipe"]["model"]["num_levels"] == 4
    with pytest.raises(ValueError, match="num_levels"):  # or the same folder would give the recipe's result
        needle.run("log_linear", tmp_path / "run", **{**common, "levels": None})
    assert not (tmp_path / "needle-log_linear.json").exists()
    with pytest.raises(ValueError, match="--levels goes with --kind log_linear, got linear"):
        needle.run("linear", tmp_path / "linear", **common)


def test_another_start_of_the_embeddings_is_a_result_of_its_own(tmp_path, monkeypatch):
    ByteTokenizer().save_pretrained(tmp_path / "bytes")
    recipe = tiny_recipe(Path("needle:20:600"), name="needle_transformer", seq_len=600, batch_tokens=1200, steps=1)
    recipe = recipe.override(embedding_range=0.05)
    monkeypatch.setattr(needle, "kind_recipe", lambda *_: recipe)
    monkeypatch.setattr(needle, "LENGTHS", (900,))
    common = dict(tokenizer=tmp_path / "bytes", results=tmp_path, examples=1)
    needle.run("transformer", tmp_path / "run", **common, embedding_range=0.02)
    assert read_object(tmp_path / "needle-transformer-embedding0.02.json")["recipe"]["model"]["embedding_range"] == 0.02
    with pytest.raises(ValueError, match="embedding_range"):
        needle.run("transformer", tmp_path / "run", **common)


def test_a_tokenizer_that_is_missing_is_known_before_training(tmp_path):
    with pytest.raises(ValueError, match="there is no tokenizer .*: run `python -m experiments.needle prepare` first"):
        needle.run("linear", tmp_path / "run", tokenizer=tmp_path / "none")
    assert not (tmp_path / "run").exists()


def test_prepared_tokenizer_keeps_every_byte_and_cuts_digits_in_threes(tmp_path, monkeypatch):
    (tmp_path / "prose.txt").write_text(PROSE)
    monkeypatch.setattr(needle, "TOKENIZER_DATA", ("needle:1500:2000", str(tmp_path / "prose.txt")))
    for name in "ab":
        needle.prepare(tmp_path / name)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    tokenizer = load_tokenizer(tmp_path / "a", VOCABULARY)
    for text in (*needle_documents(3, 900), " naïve café\t数学 \x00 😀\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize(Needle("a-b", "1234567").sentence)[-6:-1] == [":", "Ġ", "123", "456", "7"]


def searched(folder, rate, seed, bits):
    """Write a finished run's result."""
    curve = [{"split": "validation", "step": step, "bits_per_byte": value} for step, value in ((4, 0.1), (8, bits))]
    curve.append({"split": "train", "step": 8, "bits_per_byte": 0.0})
    recipe = {"name": "needle_linear", "learning_rate": rate, "seed": seed, "steps": 8}
    (folder / str(rate)).mkdir(exist_ok=True)
    result = {"recipe": recipe, "training": {"curve": curve}}
    write_object(folder / str(rate) / f"needle-linear-seed{seed}.json", result)


def stopped(out, step, bits, **changes):
    """Write the folder of a run that was stopped after its validation at a step; 0: before any."""
    recipe = tiny_recipe(Path("needle:20:600"), **{"name": "needle_linear", "seed": 10, **changes})
    out.mkdir(parents=True)
    write_run(out, recipe, {}, parameters=1, model=recipe.model_config())
    append_metrics(out, {"split": "train", "step": 1, "bits_per_byte": 0.01})
    if step:
        append_metrics(out, {"split": "validation", "step": step, "bits_per_byte": bits})


def test_a_search_shows_the_rate_of_least_validation_loss(tmp_path, capsys):
    for rate, seed, bits in ((1e-3, 10, 0.5), (1e-3, 11, 0.3), (2e-3, 10, 0.2), (2e-3, 11, 0.7)):
        searched(tmp_path, rate, seed, bits)
    needle.rates(tmp_path)
    assert capsys.readouterr().out == "linear: best 0.001 (0.001: 0.400, 0.002: 0.450)\n"
    with pytest.raises(ValueError, match="nothing is no folder, expected that of the results of a search"):
        needle.rates(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no results of a search"):
        needle.rates(tmp_path / "0.001")


def test_a_search_shows_unfinished_runs_and_says_so(tmp_path, capsys):
    searched(tmp_path, 1e-3, 10, 0.5)
    stopped(tmp_path / "0.001" / "linear", 4, 0.9, learning_rate=1e-3)  # the run of the result counts once
    stopped(tmp_path / "0.002" / "linear", 4, 0.75, learning_rate=2e-3)
    stopped(tmp_path / "0.004" / "linear", 0, None, learning_rate=4e-3)
    stopped(tmp_path / "hybrid", 4, 0.25, name="needle_hybrid")
    stopped(tmp_path / "other", 8, 0.75, name="needle_hybrid", seed=11)  # trained, but not evaluated
    needle.rates(tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "hybrid: best 0.01 (0.01: 0.500 unfinished, step 4 of 8)",
        "linear: best 0.001 (0.001: 0.500, 0.002: 0.750 unfinished, step 4 of 8)",
    ]

"""The parts that the drivers share: the recipe that a call trains, and the records of a run's course."""

import numpy as np
import pytest
import torch

from experiments import runs
from experiments.results import read_results, require_replaceable
from experiments.runs import Options, kind_recipe, recipe_of_run, train_and_evaluate, training_summary
from loglinear.runs.folder import write_run
from loglinear.runs.json_files import write_object
from tests.training.tiny import tiny_recipe


def test_blocks_are_compiled_where_there_is_a_gpu_and_nothing_else_is_said(tmp_path, monkeypatch):
    recipe, out = tiny_recipe(tmp_path), tmp_path / "run"
    assert not recipe_of_run(recipe, out).compile
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert recipe_of_run(recipe, out).compile and not recipe_of_run(recipe, out, compile=False).compile


def test_a_rate_of_a_search_replaces_the_recipes(tmp_path):
    recipe = recipe_of_run(tiny_recipe(tmp_path), tmp_path / "run", **Options(learning_rate=3e-4, seed=10).overrides)
    assert (recipe.learning_rate, recipe.seed) == (3e-4, 10)
    assert recipe_of_run(tiny_recipe(tmp_path), tmp_path / "run", **Options().overrides) == tiny_recipe(tmp_path)


def test_a_run_goes_on_as_it_began(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, seed=3)
    write_run(tmp_path, recipe, {}, parameters=1, model=recipe.model_config())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert recipe_of_run(tiny_recipe(tmp_path), tmp_path, steps=None) == recipe
    with pytest.raises(ValueError, match="holds a run of tiny, expected other"):
        recipe_of_run(tiny_recipe(tmp_path, name="other"), tmp_path)


def test_training_curve_keeps_the_mean_of_every_stretch():
    rng = np.random.default_rng(0)
    metrics = [
        {
            "split": "train",
            "step": step,
            "bits_per_byte": rng.random(),
            "tokens": step * 10,
            "seconds": step / 2,
            "tokens_per_second": 1 if step < 9 else 20,  # the first ones compile
        }
        for step in range(1, 451)
    ]
    summary = training_summary(metrics)
    assert len(summary["curve"]) == 90 and summary["curve"][-1]["step"] == 450
    mean = np.mean([record["bits_per_byte"] for record in metrics])
    assert np.mean([point["bits_per_byte"] for point in summary["curve"]]) == pytest.approx(mean)
    assert summary["tokens_per_second"] == pytest.approx(20) and summary["minutes"] == pytest.approx(225 / 60)


def test_a_kind_that_is_none_is_named():
    with pytest.raises(ValueError, match="kind must be one of linear, .* got 'loglinear'"):
        kind_recipe("long_text", "loglinear", False)


def options(tmp_path, **given):
    return Options(results=tmp_path / "results", **given)


def test_a_result_of_another_recipe_is_not_replaced(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path)
    monkeypatch.setattr(runs, "train", lambda *args, **given: pytest.fail("there was nothing to train"))
    written = {"seed": 0, "parameters": 1, "versions": {}, "training": {}, "evaluation": {}}
    tried_out = recipe.override(learning_rate=1e-4, seed=5, batch_tokens=2 * recipe.batch_tokens)
    (tmp_path / "results").mkdir()
    write_object(tmp_path / "results" / "tiny.json", {**written, "recipe": tried_out.to_dict()})
    with pytest.raises(ValueError, match="tiny.json is of a run that differs in batch_tokens, learning_rate: choose"):
        train_and_evaluate(recipe, tmp_path / "run", lambda model, recipe: {}, "tiny", options(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="nothing to train"):  # another seed has a file of its own
        train_and_evaluate(recipe, tmp_path / "run", lambda model, recipe: {}, "tiny", options(tmp_path, seed=3))


def test_a_result_of_another_evaluation_or_other_data_is_not_replaced(tmp_path):
    recipe, file = tiny_recipe(tmp_path), tmp_path / "tiny.json"
    eval_settings, data = {"data": ["a.txt"], "examples": 200}, {"train": {"fingerprint": "a"}}
    require_replaceable(file, recipe, eval_settings, data)  # there is none
    written = {"seed": 0, "parameters": 1, "versions": {}, "training": {}, "evaluation": eval_settings, "data": data}
    write_object(file, {**written, "recipe": recipe.to_dict()})
    elsewhere = recipe.override(compile=True, tokenizer="there/tokenizer", data=("there/text",))
    require_replaceable(file, elsewhere, eval_settings, data)
    with pytest.raises(ValueError, match="differs in evaluation data, examples: choose another --results"):
        require_replaceable(file, recipe, {"data": [], "examples": 4})
    with pytest.raises(ValueError, match="differs in training data: choose"):
        require_replaceable(file, recipe, eval_settings, {"train": {"fingerprint": "b"}})


def test_where_no_result_can_be_written_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "train", lambda *args, **given: pytest.fail("there was nothing to train"))
    (tmp_path / "results").write_text("")
    with pytest.raises(ValueError, match="--results must be a folder, got the file .*results"):
        train_and_evaluate(tiny_recipe(tmp_path), tmp_path / "run", lambda *_: {}, "tiny", options(tmp_path))
    with pytest.raises(ValueError, match="--results must be a folder, got the file .*results"):
        small = options(tmp_path, miniature=True)
        train_and_evaluate(tiny_recipe(tmp_path), tmp_path / "run", lambda *_: {}, "tiny", small)


def test_a_file_that_is_no_result_is_named(tmp_path):
    (tmp_path / "needle-linear.json").write_text("{}")
    with pytest.raises(ValueError, match="needle-linear.json is no result of an experiment: it has no 'seed'"):
        read_results(tmp_path, "needle", ["linear"])
    parts = dict.fromkeys(("seed", "parameters", "versions", "recipe", "training", "evaluation"))
    write_object(tmp_path / "needle-linear.json", parts)
    with pytest.raises(ValueError, match="needle-linear.json is no result of an experiment: its 'recipe' is no object"):
        read_results(tmp_path, "needle", ["linear"])

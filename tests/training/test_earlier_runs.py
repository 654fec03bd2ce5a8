"""Runs of earlier versions of this library continue."""

import dataclasses
import shutil

import pytest

from loglinear.runs.folder import read_run, run_recipe
from loglinear.runs.json_files import write_sealed
from loglinear.training.train import train
from tests.training.tiny import assert_same_run, tiny_recipe, write_text


@pytest.mark.parametrize("tau", [-0.5, 0.0])
def test_a_run_that_began_with_a_negative_tau_resumes(tmp_path, tau):
    """It was a start alone: the weights of the checkpoint have their own."""
    recipe = tiny_recipe(write_text(tmp_path / "data"), steps=2, eval_every=2, save_every=1, keep_checkpoints=2)
    recipe = dataclasses.replace(recipe, model={**recipe.model, "routing": "gram", "routing_tau": 0.0})
    train(recipe, tmp_path / "whole", progress=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-2")
    run = read_run(tmp_path / "run")
    run["recipe"]["model"]["routing_tau"] = run["model"]["routing_tau"] = tau
    write_sealed(tmp_path / "run/run.json", run)
    resumed = run_recipe(tmp_path / "run")
    assert resumed == recipe
    train(resumed, tmp_path / "run", resume=True, progress=False)
    assert_same_run(tmp_path / "run", tmp_path / "whole")

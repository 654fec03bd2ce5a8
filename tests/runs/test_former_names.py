"""A run that was begun when parameters had other names goes on as if it had been begun today."""

import shutil

import torch
from safetensors.torch import load_file, save_file

from loglinear.layers.former_names import FORMER_NAMES
from loglinear.runs.checkpoints import last_checkpoint
from loglinear.runs.loading import load_model
from loglinear.runs.manifest import MANIFEST
from loglinear.training.train import train
from tests.training.tiny import tiny_recipe, write_text


def test_a_run_with_former_names_resumes_exactly(tmp_path) -> None:
    model = tiny_recipe(tmp_path).model | {"lambda_form": "softplus"}
    recipe = tiny_recipe(write_text(tmp_path / "text"), steps=4, model=model)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(recipe, whole, progress=False)
    shutil.copytree(whole, resumed)
    shutil.rmtree(last_checkpoint(resumed))
    checkpoint = last_checkpoint(resumed)
    _rename(checkpoint / "model.safetensors")
    (checkpoint / MANIFEST).unlink()  # which such runs do not have
    load_model(checkpoint)
    train(recipe, resumed, resume=True, progress=False)
    expected, weights = (load_file(last_checkpoint(run) / "model.safetensors") for run in (whole, resumed))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def _rename(file) -> None:
    weights = load_file(file)
    for former, name in FORMER_NAMES.items():
        prefix = "model.layers.0.mixer."
        if prefix + name in weights:
            weights[prefix + former] = weights.pop(prefix + name)
    assert any(name.endswith("variant.A_log") for name in weights)
    save_file(weights, file, {"format": "pt"})

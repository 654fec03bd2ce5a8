"""Steps on documents of one length: as one recorded function, in both dtypes, and what they refuse."""

import importlib
import math
from dataclasses import replace

import pytest
import torch

from loglinear.models import LogLinearForCausalLM
from loglinear.runs.loading import load_model
from loglinear.training import trainer
from tests.data.test_corpus import corpus_of
from tests.training.tiny import assert_same_run, curve, tiny_recipe

training = importlib.import_module("loglinear.training.train")  # the package has a function of that name
TRANSFORMER = dict(layer_types=["full_attention"], num_attention_heads=2, num_key_value_heads=2, attention_head_dim=16)


def recipe_of(**changes):
    recipe = tiny_recipe("made up", seq_len=16, batch_tokens=96, **changes)
    return replace(recipe, model={**recipe.model, **TRANSFORMER})


def train(recipe, out, **options):
    corpora = corpus_of([16] * 13), corpus_of([16] * 3)
    return training.train(recipe, out, corpora=corpora, equal_rows=True, progress=False, **options)


def test_a_recorded_step_is_the_step_of_the_trainer(tmp_path, monkeypatch):
    """The recording is the function itself here: a CPU has no graphs."""
    recipe, recorded = recipe_of(), []
    train(recipe, tmp_path / "eager")
    monkeypatch.setattr(training, "_can_record", lambda device: True)
    monkeypatch.setattr(trainer, "Graphs", lambda function: recorded.append(function) or function)
    train(recipe, tmp_path / "recorded")
    assert len(recorded) == 1
    assert_same_run(tmp_path / "recorded", tmp_path / "eager")


@pytest.mark.gpu
@pytest.mark.parametrize("model", [TRANSFORMER, dict(num_levels=1), {}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_graph_of_a_step_trains_as_the_trainer_does(tmp_path, monkeypatch, model, dtype):
    recipe = recipe_of(dtype=dtype)
    recipe = replace(recipe, model={**tiny_recipe("").model, **model})
    train(recipe, tmp_path / "graphs")
    monkeypatch.setattr(training, "_can_record", lambda device: False)
    train(recipe, tmp_path / "eager")
    for ours, expected in zip(curve(tmp_path / "graphs"), curve(tmp_path / "eager"), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=2e-3 if dtype == "float32" else 2e-2)


def test_a_step_of_a_transformer_reads_no_value():
    """A graph cannot be recorded of a step that waits for a value. Tensors without values show it on any machine."""
    with torch.device("meta"):
        model = LogLinearForCausalLM(recipe_of().model_config()).train()
        tokens = torch.zeros(3, 16, dtype=torch.long)
        loss = model(input_ids=tokens, labels=tokens).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert {gradient.device.type for gradient in gradients} == {"meta"}


def test_the_dtype_of_a_recipe_is_that_of_its_products(tmp_path):
    losses = {}
    for dtype in (None, "float32", "bfloat16"):
        train(recipe_of(dtype=dtype), tmp_path / str(dtype))
        losses[dtype] = [line["loss"] for line in curve(tmp_path / str(dtype))]
        assert load_model(tmp_path / str(dtype)).dtype == torch.float32
    assert losses[None] == losses["float32"] != losses["bfloat16"]  # on a CPU
    assert all(math.isclose(*pair, rel_tol=0.02) for pair in zip(losses["float32"], losses["bfloat16"], strict=True))


def test_steps_that_are_not_one_row_of_an_uncompiled_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="recorded without a compiler: use --no-compile"):
        train(recipe_of(compile=True), tmp_path)
    with pytest.raises(ValueError, match="a step on whole documents is one row: leave out micro_batch_tokens = 48"):
        train(recipe_of(micro_batch_tokens=48), tmp_path)

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from loglinear.models import LogLinearForCausalLM
from loglinear.runs.checkpoints import resolve
from loglinear.runs.loading import load_model
from tests.training.tiny import tiny_recipe


@pytest.fixture
def checkpoint(tmp_path):
    LogLinearForCausalLM(tiny_recipe(tmp_path).model_config()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_loads_what_was_saved(checkpoint):
    tokens = torch.arange(40)[None]
    first, second = (load_model(checkpoint)(tokens).logits for _ in range(2))
    assert torch.equal(first, second) and not load_model(checkpoint).training


def test_truncated_weights(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"is not whole: model\.safetensors is truncated"):
        load_model(checkpoint)


def test_truncated_config(checkpoint):
    file = checkpoint / "config.json"
    file.write_text(file.read_text()[:-50])
    with pytest.raises(ValueError, match=r"is not whole: config\.json is truncated"):
        load_model(checkpoint)


def test_truncated_generation_config(checkpoint):
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": ')
    with pytest.raises(ValueError, match=r"is not whole: generation_config\.json is truncated"):
        load_model(checkpoint)


def test_config_that_is_no_object(checkpoint):
    (checkpoint / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is truncated or no JSON object"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_heads", None),
        ("hidden_size", None),
        ("hidden_size", "wide"),
        ("hidden_size", 32.5),
        ("layer_types", 3),
        ("rms_norm_eps", "small"),
        ("dtype", "floaty"),
    ],
)
def test_config_field_of_another_type_is_named(checkpoint, name, value):
    file = checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(ValueError, match=rf"config\.json.*({name}|{value})"):
        load_model(checkpoint)


def test_integer_serves_as_float(checkpoint):
    file = checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_theta": 5000}))
    assert load_model(checkpoint).config.rope_theta == 5000


def test_another_kind_of_model(checkpoint):
    file = checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "llama"}))
    with pytest.raises(ValueError, match="holds a 'llama' model, expected 'loglinear'"):
        load_model(checkpoint)


@pytest.mark.parametrize("change", ["shape", "missing", "extra"])
def test_weights_of_another_model(checkpoint, change):
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    name = "model.norm.weight"
    if change == "shape":
        weights[name] = torch.ones(7)
    elif change == "missing":
        del weights[name]
    else:
        weights["model.surplus"] = torch.ones(7)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds the weights of another model than its config.json"):
        load_model(checkpoint)


def test_missing_folder_and_folder_without_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint at"):
        resolve(tmp_path / "nothing")
    with pytest.raises(ValueError, match="not downloaded: `hf download nobody/nothing --local-dir FOLDER` first"):
        resolve("nobody/nothing")
    with pytest.raises(ValueError, match="no checkpoint in"):
        resolve(tmp_path)


def test_run_folder_means_its_newest_whole_checkpoint(checkpoint, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for step in (9, 10, 100):
        (run / f"checkpoint-{step}").mkdir()
        for file in checkpoint.iterdir():
            (run / f"checkpoint-{step}" / file.name).write_bytes(file.read_bytes())
    assert resolve(run).name == "checkpoint-100"
    (run / "checkpoint-100" / "model.safetensors").unlink()
    assert resolve(run).name == "checkpoint-10"

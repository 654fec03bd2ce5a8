"""Values of other types are refused when a configuration is made; configurations of earlier versions load."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loglinear
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.runs.loading import load_model
from loglinear.upgrades.checkpoint import ENTRY
from tests.models.tiny_models import ROUTED, tiny_config, tokens
from tests.upgrades.tiny import original

REQUIRED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_levels", "num_heads", "key_dim", "head_dim"),
    "loss_chunk_size",
)
OPTIONAL = ("num_groups", "num_attention_heads", "num_key_value_heads", "attention_head_dim")
OTHERS = (
    *("intermediate_size", "chunk_size", "radix", "finest_block", "largest_block", "decode_top_k"),
    *("conv_kernel", "bos_token_id", "pad_token_id"),
)
MISTAKES = [
    *[({name: 2.5}, f"{name} must be an integer of at least 1, got 2.5") for name in REQUIRED + OPTIONAL],
    *[({name: True}, f"{name} must be an integer of at least 1, got True") for name in REQUIRED + OPTIONAL],
    *[({name: None}, f"{name} must be an integer of at least 1, got None") for name in REQUIRED],
    ({"vocab_size": "40"}, "vocab_size must be an integer of at least 1, got '40'"),
    ({"intermediate_size": 24.0}, "intermediate_size must be an integer of at least 0, got 24.0"),
    ({"conv_kernel": True}, "conv_kernel must be an integer of at least 0, got True"),
    ({"chunk_size": True}, "chunk_size must be a power of two, got True"),
    ({"chunk_size": 4.0}, "chunk_size must be a power of two, got 4.0"),
    ({"radix": 2.0}, "radix must be a power of two of at least 2, got 2.0"),
    ({"finest_block": True}, "finest_block must be a power of two of at least 1, got True"),
    ({"largest_block": 8.0}, "largest_block must be a power of two of at least 1, got 8.0"),
    ({**ROUTED, "decode_top_k": 2.0}, "decode_top_k must be an integer of at least 1 or None, got 2.0"),
    ({"pad_token_id": 0.5}, "pad_token_id must be an integer, got 0.5"),
    ({"bos_token_id": [1]}, "bos_token_id must be an integer, got [1]"),
    ({"eos_token_id": "2"}, "eos_token_id must be an integer or a list of them, got '2'"),
    ({"eos_token_id": [2, True]}, "eos_token_id must be an integer or a list of them, got [2, True]"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number, got '1e-5'"),
    ({"rope_theta": None}, "rope_theta must be a number, got None"),
    ({"initializer_range": True}, "initializer_range must be a number, got True"),
    ({"output_gate": "no"}, "output_gate must be True or False, got 'no'"),
    ({"negative_eigenvalues": 1}, "negative_eigenvalues must be True or False, got 1"),
    ({"variant": "kimi_delta_attention", "gate_lower_bound": True}, "gate_lower_bound must be a number, got True"),
    ({"layer_types": 2}, "layer_types must be a list of linear_attention and full_attention, got 2"),
]


@pytest.mark.parametrize(("options", "text"), MISTAKES, ids=[str(options) for options, _ in MISTAKES])
def test_a_value_of_another_type_is_refused_in_one_line(options, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        tiny_config(**options)


def test_every_integer_field_is_checked():
    integers = {name for name, kind in LogLinearConfig.__annotations__.items() if kind in (int, int | None)}
    assert integers == {*REQUIRED, *OPTIONAL, *OTHERS} <= {name for options, _ in MISTAKES for name in options}


def test_integers_of_numpy_become_plain_ones(tmp_path):
    config = tiny_config(
        hidden_size=np.int64(16), num_levels=np.int32(5), finest_block=np.int64(2), chunk_size=np.int8(4)
    )
    config.save_pretrained(tmp_path)
    assert LogLinearConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def saved_by_an_earlier_version(model, folder, **fields):
    """Save a model with fields that only earlier versions allowed."""
    model.save_pretrained(folder)
    file = folder / "config.json"
    values = json.loads(file.read_text())
    values.get(ENTRY, values).update(fields)
    file.write_text(json.dumps(values))


def test_whole_numbers_that_earlier_versions_took_load(make_model, tmp_path):
    model = make_model(torch.float32, num_levels=1, conv_kernel=1)
    saved_by_an_earlier_version(model, tmp_path, num_levels=True, conv_kernel=True, radix=2.0, num_hidden_layers=2.0)
    loaded = LogLinearForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    values = [getattr(loaded.config, name) for name in ("num_levels", "conv_kernel", "radix", "num_hidden_layers")]
    assert values == [1, 1, 2, 2] and all(type(value) is int for value in values)


def test_a_model_that_began_with_a_negative_tau_loads_with_the_same_logits(make_model, tmp_path):
    model = make_model(torch.float32, **ROUTED, num_levels=9)
    for layer in model.model.layers:
        layer.mixer.bucket_weights.score_bias.tau.data.fill_(-0.5)
    saved_by_an_earlier_version(model, tmp_path, routing_tau=-0.5)
    expected = model(tokens(2, 50)).logits
    for loaded in (LogLinearForCausalLM.from_pretrained(tmp_path), load_model(tmp_path)):
        assert torch.equal(loaded(tokens(2, 50)).logits, expected)
        assert loaded.config.routing_tau == 0
    with pytest.raises(ValueError, match=r"^routing_tau must be a finite number of at least 0, got -0.5$"):
        tiny_config(**ROUTED, routing_tau=-0.5)


def test_an_upgrade_that_began_with_a_negative_tau_loads_with_the_same_logits(tmp_path):
    model, ids = original("qwen3_5"), torch.arange(3, 43)[None]
    loglinear.upgrade(model, num_levels=4, routing="gram")
    for name, parameter in model.named_parameters():
        if name.endswith("score_bias.tau"):
            parameter.data.fill_(-0.5)
    model.eval()
    saved_by_an_earlier_version(model, tmp_path, routing_tau=-0.5)
    file = tmp_path / "upgrade.safetensors"
    loglinear.save_upgrade(model, file)
    with_metadata_of_an_earlier_version(file, routing_tau=-0.5)
    other = original("qwen3_5")
    loglinear.load_upgrade(other, file)
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(load_model(tmp_path)(ids).logits, expected)
        assert torch.equal(other.eval()(ids).logits, expected)
    with pytest.raises(ValueError, match="routing_tau must be a finite number of at least 0, got -0.5"):
        loglinear.upgrade(original("qwen3_5"), num_levels=4, routing="gram", routing_tau=-0.5)


def with_metadata_of_an_earlier_version(file, **fields):
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    entry = json.loads(metadata[ENTRY])
    save_file(load_file(file), file, metadata={ENTRY: json.dumps({**entry, **fields})})

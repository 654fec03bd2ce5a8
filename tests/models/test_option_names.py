"""Names of options: a misspelt one is refused or named, and transformers' own ones and saved files go on working."""

import copy
import json
import logging
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loglinear.models import LogLinearConfig, LogLinearForCausalLM, configuration
from tests.models.tiny_models import tiny_config

OF_TRANSFORMERS = dict(
    num_labels=3,
    torch_dtype="float32",
    attn_implementation="sdpa",
    architectures=["A"],
    transformers_version="5.0.0",
    output_attentions=False,
    output_hidden_states=False,
    return_dict=True,
    sep_token_id=2,
    num_beam_groups=1,
    quantization_config={"load_in_8bit": True},
    id2label={0: "a", 1: "b", 2: "c"},
    name_or_path="a",
    _commit_hash=None,
)


@contextmanager
def lines():
    """The lines that configurations log."""
    found, handler = [], logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = configuration.logger
    type(logger).warning_once.cache_clear()
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("num_levls", "num_levels"),
        ("num_level", "num_levels"),
        ("lambda_from", "lambda_form"),
        ("layer_type", "layer_types"),
        ("head_dims", "head_dim"),
        ("attn_head_dim", "attention_head_dim"),
    ],
)
def test_a_misspelt_option_is_refused_in_one_line(name, option):
    for make in (LogLinearConfig, lambda **options: AutoConfig.for_model("loglinear", **options)):
        with pytest.raises(ValueError, match=f"^{name} is no option of LogLinearConfig: did you mean {option}[?]$"):
            make(**{name: 3})


def test_an_unknown_option_is_an_attribute_and_a_line_says_that_nothing_reads_it():
    with lines() as found:
        config = LogLinearConfig(bread="rye")
    assert found == ["bread is no option of LogLinearConfig: it is an attribute that nothing reads"]
    assert config.bread == "rye"


def test_options_of_transformers_are_taken_without_a_word():
    with lines() as found:
        config = LogLinearConfig(**OF_TRANSFORMERS)
        same = LogLinearConfig(**config.to_dict())
        copies = [LogLinearConfig.from_dict(config.to_dict()), copy.deepcopy(config)]
    assert found == [] and config.num_labels == 3 and config.dtype == torch.float32
    assert [other.to_dict() for other in (same, *copies)] == [config.to_dict()] * 3


def test_a_saved_configuration_keeps_what_it_does_not_know_and_names_what_is_misspelt(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_levls": 3, "bread": "rye"}))
    with lines() as found:
        config, rest = LogLinearConfig.from_pretrained(tmp_path, return_unused_kwargs=True, wine="red")
    assert found == ["num_levls is no option of LogLinearConfig, so it has no effect: num_levels is one"]
    assert (config.num_levls, config.bread, config.num_levels, rest) == (
        3,
        "rye",
        tiny_config().num_levels,
        {"wine": "red"},
    )
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (again["num_levls"], again["bread"]) == (3, "rye")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_levels": 2.5}, "num_levels must be an integer of at least 1, got 2.5"),
        ({"chunk_size": 3}, "chunk_size must be a power of two, got 3"),
        ({"num_hidden_layers": 7}, "layer_types must have num_hidden_layers = 7 entries, got 2"),
        ({"impl": "magic"}, "impl must be one of auto"),
    ],
)
def test_options_beside_a_folder_are_checked(tmp_path, changes, message):
    LogLinearForCausalLM(tiny_config(num_hidden_layers=2)).save_pretrained(tmp_path)
    for kind in (LogLinearConfig, AutoConfig, LogLinearForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=message):
            kind.from_pretrained(tmp_path, **changes)


def test_options_beside_a_folder_take_effect(tmp_path):
    LogLinearForCausalLM(tiny_config()).save_pretrained(tmp_path)
    for kind in (LogLinearForCausalLM, AutoModelForCausalLM):
        model = kind.from_pretrained(tmp_path, chunk_size=8, impl="reference", dtype=torch.float64)
        assert (model.config.chunk_size, model.config.impl, model.dtype) == (8, "reference", torch.float64)
        assert model.model.layers[0].mixer.chunk_size == 8

"""`loglinear.upgrade`: its report, and the models and arguments that it refuses."""

import logging

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import attach_align_device_hook
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3_5TextConfig

import loglinear
from loglinear.upgrades import UpgradeReport
from loglinear.upgrades.checkpoint import ENTRY
from loglinear.upgrades.families import FAMILIES, family_of
from loglinear.upgrades.mixer import UpgradedMixer
from tests.upgrades.tiny import LEVELS, MODELS, original, upgraded


def test_the_report_counts_what_changed(caplog):
    model = original("qwen3_next")
    before = sum(p.numel() for p in model.parameters())
    with caplog.at_level(logging.INFO, logger="loglinear"):
        report = loglinear.upgrade(model, **LEVELS)
    layers = ["model.layers.0.linear_attn", "model.layers.2.linear_attn"]
    assert report.layers == dict.fromkeys(layers, "Qwen3NextGatedDeltaNet") and report.kept == 1
    assert report.new_parameters == 2 * (4 * 6) * (32 + 1)  # per layer: heads, levels, hidden size and bias
    assert report.parameters == before + report.new_parameters
    assert str(report).splitlines() == caplog.messages[0].splitlines() and len(str(report).splitlines()) == 2
    assert str(report).startswith(
        "2 linear layers (Qwen3NextGatedDeltaNet) are now log-linear, the other one is unchanged\n"
    )
    assert str(loglinear.upgrade(original("mamba2"), **LEVELS)).startswith(
        "3 linear layers (Mamba2Mixer) are now log-linear\n"
    )


def test_the_report_counts_in_words():
    report = UpgradeReport({"a": "Mixer"}, 1, 5, 10)
    assert str(report).startswith("1 linear layer (Mixer) is now log-linear, the other one is unchanged\n5 new")
    report = UpgradeReport({"a": "Mixer", "b": "Mixer"}, 3, 5, 10)
    assert str(report).startswith("2 linear layers (Mixer) are now log-linear, the other 3 are unchanged\n5 new")


def test_freezing_is_a_choice():
    frozen, free = (upgraded(original("qwen3_5"), freeze=freeze) for freeze in (True, False))
    assert {name for name, p in frozen.named_parameters() if p.requires_grad} == {*loglinear.new_parameters(frozen)}
    assert all(p.requires_grad for p in free.parameters())


@pytest.mark.parametrize("family", MODELS)
def test_modules_and_parameters_stay_the_same_objects(family):
    model = original(family)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    loglinear.upgrade(model, **LEVELS)
    assert all(module is dict(model.named_modules())[name] for name, module in modules.items())
    assert all(parameter is model.get_parameter(name) for name, parameter in parameters.items())


@torch.no_grad()
def test_hooks_of_accelerate_stay():
    """They move inputs, and fetch offloaded parameters: also after an upgrade, and for an upgraded model."""
    ids, device = torch.arange(3, 43)[None], torch.device("cpu")
    model = original("qwen3_next")
    attach_align_device_hook(model, execution_device=device, offload=False)
    loglinear.upgrade(model, **LEVELS)
    right = upgraded(original("qwen3_next"))(ids).logits
    assert torch.equal(model(ids).logits, right)
    offloaded = cpu_offload(upgraded(original("qwen3_next")), execution_device=device)
    assert all(p.is_meta for p in offloaded.parameters())
    assert torch.equal(offloaded(ids).logits, right)


def test_every_family_names_its_class():
    found = {type(m).__name__ for make in MODELS for m in original(make).modules() if family_of(m) is not None}
    assert found == {*FAMILIES}


def refused(model, **options) -> str:
    with pytest.raises(ValueError) as caught:
        loglinear.upgrade(model, **{**LEVELS, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_models_without_a_linear_layer_are_refused():
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    assert refused(llama).startswith("LlamaForCausalLM has no linear layer that can be upgraded, supported are Qwen3")
    assert refused(nn.Linear(2, 2)) == "model must be a model of transformers, got Linear"


def test_an_offloaded_model_is_refused():
    model = cpu_offload(original("qwen3_5"), execution_device=torch.device("cpu"))
    assert refused(model) == "model must have its parameters in memory, some are offloaded: upgrade it before"


def test_an_upgraded_model_is_refused():
    assert refused(upgraded(original("qwen3_5"))).startswith("model is already upgraded: load the original again")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_levels": 1}, "num_levels must be at least 2 (1 is the linear model itself), got 1"),
        ({"num_levels": 65}, "num_levels must be at most 64, got 65"),
        ({"chunk_size": 3}, "chunk_size must be a power of two, got 3"),
        ({"routing": "cosine"}, "routing must be one of gram, selective_gram or None, got 'cosine'"),
        ({"impl": "cuda"}, "impl must be one of auto, triton, torch, reference, got 'cuda'"),
        ({"finest_block": 64}, "finest_block must be a power of two of at most 2**(num_levels - 2) tokens, got 64"),
    ],
)
def test_arguments_out_of_range_are_refused_and_change_nothing(options, message):
    model = original("qwen3_5")
    assert refused(model, **options).startswith(message)
    assert not any(isinstance(module, UpgradedMixer) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_options_that_are_not_represented_are_refused_by_name():
    model = original("qwen3_5")
    for block in model.model.layers:
        if hasattr(block, "linear_attn"):
            block.linear_attn.activation = "gelu"
    message = "Qwen3_5ForCausalLM cannot be upgraded exactly: hidden_act='gelu' (silu is supported)"
    assert refused(model) == message


@pytest.mark.parametrize("family", ["kimi_linear", "glm5_next"])
def test_the_activation_of_kimi_delta_attention_is_silu(family):
    message = f"{type(original(family)).__name__} cannot be upgraded exactly: hidden_act='gelu' (silu is supported)"
    assert refused(original(family, hidden_act="gelu")) == message


def test_a_layer_whose_forward_pass_was_replaced_is_refused():
    """The replacement would hide that of the upgrade."""
    model = original("qwen3_5")
    mixer = model.model.layers[0].linear_attn
    mixer.forward = mixer.forward
    assert "cannot be upgraded exactly: a forward pass that was replaced" in refused(model)


@pytest.mark.parametrize("context", [torch.inference_mode(), torch.device("meta")], ids=["inference", "meta"])
def test_new_parameters_are_ordinary_whatever_context_made_them(context):
    model = original("qwen3_5")
    with context:
        loglinear.upgrade(model, **LEVELS)
    ids = torch.arange(3, 23)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in loglinear.new_parameters(model).values())


def test_a_model_with_adapters_is_refused():
    """The upgrade would freeze them, and PEFT would save them without the level weights."""
    model = original("qwen3_5")
    adapted = get_peft_model(model, LoraConfig(target_modules=["out_proj"]))
    with pytest.raises(ValueError, match="model has adapters of PEFT: upgrade it before it gets them, or after merge"):
        loglinear.upgrade(adapted.get_base_model(), **LEVELS)
    assert loglinear.upgrade(adapted.merge_and_unload(), **LEVELS).layers


def test_models_that_shared_a_configuration_have_their_own():
    linear = original("qwen3_5")
    config = linear.config
    models = [type(linear)(config) for _ in range(2)]
    for model, radix in zip(models, (2, 4), strict=True):
        loglinear.upgrade(model, num_levels=4, radix=radix)
    assert not hasattr(linear.config, ENTRY) and type(linear.config) is Qwen3_5TextConfig
    assert [getattr(model.config, ENTRY)["radix"] for model in models] == [2, 4]
    for model in models:
        configs = {id(module.config) for module in model.modules() if hasattr(module, "config")}
        assert configs == {id(model.config)}


def test_tau_of_zero_alone_is_neutral():
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        logits = [upgraded(original("qwen3_5"), routing="gram", routing_tau=tau)(ids).logits for tau in (0.0, 1.0)]
        right = original("qwen3_5")(ids).logits
    assert torch.allclose(logits[0], right, atol=1e-4) and not torch.allclose(logits[1], right, atol=1e-2)

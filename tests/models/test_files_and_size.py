import pytest
import torch
from tiny_models import HYBRID, tiny_config, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from loglinear.models import (
    LogLinearConfig,
    LogLinearForCausalLM,
    LogLinearModel,
    key_value_cache_bytes,
    parameter_counts,
    state_bytes,
)
from loglinear.variants import VARIANTS


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [*({"variant": name} for name in VARIANTS), {"lambda_form": "unit"}, HYBRID])
def test_files_bring_back_every_bit(make_model, tmp_path, options: dict, tied: bool) -> None:
    model = make_model(torch.float32, tie_word_embeddings=tied, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, LogLinearForCausalLM)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    ids = tokens(2, 9)
    assert torch.equal(model(ids).logits, loaded.eval()(ids).logits)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LogLinearConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), LogLinearModel)


def test_what_a_checkpoint_lacks_is_initialised_and_the_rest_left_alone(make_model, tmp_path) -> None:
    """A linear model's checkpoint opened as a log-linear one starts as exactly that model ("unit")."""
    twin = make_model(torch.float32, num_levels=1)
    for parameter in twin.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    twin.save_pretrained(tmp_path)
    grown = LogLinearForCausalLM.from_pretrained(tmp_path, num_levels=5, lambda_form="unit").eval()
    logits = [model.double()(tokens(1, 30)).logits for model in (grown, twin)]
    torch.testing.assert_close(*logits, rtol=1e-10, atol=1e-10)
    assert grown.model.layers[0].mixer.level_scales is not None


def test_a_missing_parameter_leaves_its_neighbours_as_loaded(make_model, tmp_path) -> None:
    model = make_model(torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    missing = "model.layers.0.mixer.variant.skip_bias.D"
    weights = {name: value for name, value in model.state_dict().items() if name != missing}
    model.save_pretrained(tmp_path, state_dict=dict(weights))
    loaded = LogLinearForCausalLM.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, torch.ones(4) if name == missing else weights[name]), name


def test_gate_parameters_stay_float32_in_a_16_bit_model(make_model, tmp_path) -> None:
    make_model(torch.float32, lambda_form="softplus").save_pretrained(tmp_path)
    mixer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).model.layers[0].mixer
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    biases = (mixer.variant.gate_bias, mixer.variant.skip_bias, mixer.level_scales.level_bias)
    assert {p.dtype for bias in biases for p in bias.parameters()} == {torch.float32}


def test_parameters_start_where_their_modules_say() -> None:
    model = LogLinearForCausalLM(tiny_config(num_heads=64))
    variant = model.model.layers[1].mixer.variant
    rates, steps = variant.gate_bias.A_log.exp(), torch.nn.functional.softplus(variant.gate_bias.dt_bias)
    assert rates.min() >= 1 and rates.max() <= 16 and rates.std() > 2
    assert steps.min() >= 0.99e-3 and steps.max() <= 0.101 and steps.log().std() > 0.5
    assert torch.equal(variant.skip_bias.D, torch.ones(64))
    assert model.model.layers[1].mixer.conv.weight.abs().max() <= 0.5


@pytest.mark.parametrize("options", [{}, {"num_levels": 1}, {"tie_word_embeddings": True}, HYBRID])
def test_parameter_counts_are_the_models(options: dict) -> None:
    config = tiny_config(**options)
    counts, model = parameter_counts(config), LogLinearForCausalLM(config)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.level_scales == sum(p.numel() for name, p in model.named_parameters() if "level_scales" in name)
    assert (counts.level_scales > 0) == (config.num_levels > 1)
    assert counts.embeddings == 40 * 16 * (1 if config.tie_word_embeddings else 2)


@pytest.mark.parametrize(("name", "share"), [("mamba2", 0.03), ("gated_delta_net", 0.004)])
def test_lambda_is_a_small_share_at_the_papers_sizes(name: str, share: float) -> None:
    sizes = dict(vocab_size=32_000, hidden_size=1536, num_hidden_layers=21, intermediate_size=4096, num_levels=15)
    counts = parameter_counts(LogLinearConfig(variant=name, **VARIANTS[name].paper_heads._asdict(), **sizes))
    assert 0 < counts.lambda_share < share
    assert 650e6 < counts.total < 900e6


@pytest.mark.parametrize("options", [{}, {"variant": "delta_net"}, {"num_levels": 1}, HYBRID])
def test_state_bytes_are_the_caches(make_model, options: dict) -> None:
    model = make_model(torch.float32, **options)
    for length in (3, 40):
        cache = model(tokens(1, length)).past_key_values
        assert cache.nbytes == state_bytes(model.config, length, torch.float32)


def test_key_value_cache_bytes_are_a_transformers() -> None:
    config = tiny_config(layer_types=["full_attention", "full_attention"])
    assert key_value_cache_bytes(tiny_config(), 1000) == state_bytes(config, 1000) == 2 * 2 * 1000 * 8 * 2

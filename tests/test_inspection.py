"""The weights that `bucket_weights` shows are those that the operators got."""

import re

import pytest
import torch

import loglinear
from loglinear.inspection import bucket_weights
from loglinear.layers.token_mixer import TokenMixer
from loglinear.models import LogLinearForCausalLM
from tests.models.tiny_models import HYBRID, ROUTED, ROUTED_DELTA, TRANSFORMER, tiny_config, tokens
from tests.upgrades import tiny

MODELS = {
    "lambda": {},
    "delta_net": {"variant": "delta_net"},
    "hybrid": HYBRID,
    "routed": ROUTED,
    "routed_delta": ROUTED_DELTA,
    "routed_hybrid": HYBRID | ROUTED,
}
every_model = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)


def model_of(**options) -> LogLinearForCausalLM:
    torch.manual_seed(0)
    model = LogLinearForCausalLM(tiny_config(**options)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def watch_operators(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return a list to which every operator of the model adds the weights that it gets."""
    got = []

    def watched(operator):
        def call(*tensors, **options):
            got.append(tensors[-1])
            return operator(*tensors, **options)

        return call

    for module in model.modules():
        if isinstance(module, TokenMixer):
            module.operator = watched(module.operator)
    return got


@every_model
@pytest.mark.parametrize("cuts", [None, [0, 1, 18, 18, 50]], ids=["plain", "packed"])
def test_weights_are_those_of_the_operators(options, cuts) -> None:
    model = model_of(**options)
    got = watch_operators(model)
    ids = tokens(2, 50) if cuts is None else tokens(1, 50)
    found = bucket_weights(model, ids, cu_seqlens=None if cuts is None else torch.tensor(cuts))
    names = [name for name, part in model.named_modules() if isinstance(part, TokenMixer)]
    assert [layer.name for layer in found] == names and len(got) == len(names) > 0
    assert all(torch.equal(layer.weights, weights) for layer, weights in zip(found, got, strict=True))
    assert {layer.weights.shape for layer in found} == {(*ids.shape, 4, model.config.num_levels)}
    assert not any(layer.weights.requires_grad for layer in found)
    assert not any(module._forward_hooks for module in model.modules())


@every_model
def test_packed_sequences_have_the_weights_that_they_have_alone(options) -> None:
    model, ids, cuts = model_of(**options).double(), tokens(1, 50), [0, 1, 18, 50]
    packed = bucket_weights(model, ids, cu_seqlens=torch.tensor(cuts))
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        for layer, alone in zip(packed, bucket_weights(model, ids[:, start:end]), strict=True):
            torch.testing.assert_close(layer.weights[:, start:end], alone.weights, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [dict(lambda_form="unit"), ROUTED | dict(routing_tau=0.0)], ids=["unit", "routed"])
def test_neutral_weights_are_exactly_one(options) -> None:
    """Those of buckets that hold a token; a routed read gives the others 0."""
    torch.manual_seed(0)
    for layer in bucket_weights(LogLinearForCausalLM(tiny_config(**options)), tokens(1, 40)):
        for t in range(40):
            live = torch.tensor([len(bucket) > 0 for bucket in layer.buckets(t)])
            weights = layer.weights[0, t]
            assert (weights[:, live] == 1).all() and live.any()
            assert "routing" not in options or not weights[:, ~live].any()
            assert sum(map(len, layer.buckets(t))) == t + 1


@pytest.mark.parametrize("routing", [None, "gram"])
def test_upgraded_models_show_theirs(routing) -> None:
    torch.manual_seed(0)
    model = tiny.mamba2().eval()
    loglinear.upgrade(model, **tiny.LEVELS, routing=routing, finest_block=4 if routing else 1)
    for parameter in loglinear.new_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    got, ids = watch_operators(model), tokens(1, 50)
    for boundaries in (None, torch.tensor([0, 7, 50])):
        got.clear()
        found = bucket_weights(model, ids, cu_seqlens=boundaries)
        assert len(found) == len(got) == 3
        assert all(torch.equal(layer.weights, weights) for layer, weights in zip(found, got, strict=True))


@pytest.mark.parametrize("options", [TRANSFORMER, dict(num_levels=1)], ids=["transformer", "linear"])
def test_models_without_a_log_linear_layer_are_refused(options) -> None:
    text = "model must have a log-linear layer of at least 2 levels, LogLinearForCausalLM has none"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        bucket_weights(model_of(**options), tokens(1, 5))


def test_compiled_layers_show_the_same() -> None:
    model, ids = model_of(), tokens(1, 20)
    expected = bucket_weights(model, ids)
    model.model.layers[0].compile(backend="eager")
    with torch.no_grad():
        model.base_model(input_ids=ids, use_cache=False)  # without hooks, which later calls of this graph do not see
    for _ in range(2):
        found = bucket_weights(model, ids)
        assert [layer.name for layer in found] == [layer.name for layer in expected]
        assert all(torch.equal(layer.weights, old.weights) for layer, old in zip(found, expected, strict=True))

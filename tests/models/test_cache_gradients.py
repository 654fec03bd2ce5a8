"""The past in a cache is constant: gradients are those of the new tokens alone, in every layer, however it was made."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from tiny_models import HYBRID, TRANSFORMER, tokens

from loglinear.models import LogLinearCache

MODELS = pytest.mark.parametrize(
    "options",
    [{"variant": "mamba2"}, {"variant": "gated_delta_net"}, HYBRID, TRANSFORMER],
    ids=["mamba2", "gated_delta_net", "hybrid", "softmax"],
)
STATIC = pytest.mark.parametrize("columns", [None, 40], ids=["dynamic", "static"])
MODES = {"grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}
STEP = 1e-6  # with 1e-5 the error of the difference itself is above the budget


def loss_of(model, piece, cache):
    logits = model(piece, past_key_values=cache).logits
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
    return (logits * weights).sum() / logits.numel() ** 0.5


def slope(model, directions, piece, cache):
    """The derivative of a piece's loss along `directions`, where the cache stays as it is: a central difference."""
    losses = []
    for sign in (1, -2):
        for parameter, direction in zip(model.parameters(), directions, strict=True):
            parameter.data.add_(direction, alpha=sign * STEP)
        with torch.no_grad():
            losses.append(float(loss_of(model, piece, copy.deepcopy(cache))))
    for parameter, direction in zip(model.parameters(), directions, strict=True):
        parameter.data.add_(direction, alpha=STEP)
    return (losses[0] - losses[1]) / (2 * STEP)


def along(directions, grads):
    return float(sum((d * g).sum() for d, g in zip(directions, grads, strict=True)))


def some_directions(model):
    return [torch.randn_like(parameter) for parameter in model.parameters()]


@MODELS
@STATIC
@pytest.mark.parametrize(
    "first, second", [("grad", "grad"), ("no_grad", "grad"), ("inference", "inference"), ("grad", "inference")]
)
def test_the_past_of_a_cache_is_constant(make_model, options, columns, first, second) -> None:
    """Each piece's gradients, whatever made the pieces before it; 7 + 2 + 1 + 4 tokens."""
    model, ids = make_model(**options), tokens(2, 14)
    cache = LogLinearCache(model.config, columns)
    with MODES[first]():
        loss_of(model, ids[:, :7], cache)
    with MODES[second]():
        loss_of(model, ids[:, 7:9], cache)
    for piece in (ids[:, 9:10], ids[:, 10:]):
        before, directions = copy.deepcopy(cache), some_directions(model)
        grads = torch.autograd.grad(loss_of(model, piece, cache), list(model.parameters()))
        expected = slope(model, directions, piece, before)
        assert abs(along(directions, grads) - expected) < 1e-6 * max(1.0, abs(expected))


@MODELS
@STATIC
def test_a_backward_after_each_piece_equals_one_of_their_sum(make_model, options, columns) -> None:
    model, ids = make_model(**options), tokens(2, 12)
    pieces, parameters = ids.split([5, 1, 6], 1), list(model.parameters())
    cache = LogLinearCache(model.config, columns)
    each = [torch.autograd.grad(loss_of(model, piece, cache), parameters) for piece in pieces]
    cache = LogLinearCache(model.config, columns)
    together = torch.autograd.grad(sum(loss_of(model, piece, cache) for piece in pieces), parameters)
    for expected, *parts in zip(together, *each, strict=True):
        torch.testing.assert_close(sum(parts), expected, rtol=1e-10, atol=1e-10)


@MODELS
@STATIC
def test_nothing_that_a_cache_keeps_has_a_graph(make_model, options, columns) -> None:
    model, ids = make_model(**options), tokens(2, 9)
    cache = LogLinearCache(model.config, columns)
    for piece in ids.split([5, 4], 1):
        loss_of(model, piece, cache)
    kept = [tensor for layer in cache.layers for tensor in tensors_of(layer)]
    assert kept and not any(tensor.requires_grad for tensor in kept)
    twin, back = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    with torch.no_grad():
        expected = model(ids[:, :3], past_key_values=cache).logits
        for other in (twin, back):
            assert torch.equal(model(ids[:, :3], past_key_values=other).logits, expected)


def tensors_of(layer) -> list[torch.Tensor]:
    parts = [layer.keys, layer.values, *([] if getattr(layer, "state", None) is None else layer.state.tensors)]
    return [part for part in parts if part is not None]


@MODELS
@STATIC
def test_rows_that_move_while_a_backward_waits_change_no_gradient(make_model, options, columns) -> None:
    """Steps, reordering and a reset write into a cache's memory; what a backward needs is not in it."""
    model, ids = make_model(**options), tokens(2, 9)
    parameters = list(model.parameters())

    def gradients(disturb):
        cache = LogLinearCache(model.config, columns)
        with torch.no_grad():
            loss_of(model, ids[:, :6], cache)
        loss = loss_of(model, ids[:, 6:], cache)
        if disturb:
            with torch.no_grad():
                model(ids[:, :1], past_key_values=cache)
                cache.reorder_cache(torch.tensor([1, 0]))
                cache.reset()
        return torch.autograd.grad(loss, parameters)

    for a, b in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(a, b)

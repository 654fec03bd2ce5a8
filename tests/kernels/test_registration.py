"""An `Operator` is to torch what a custom operator is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from loglinear.kernels.triton.registration import Operator  # noqa: E402


@Operator
def scaled_square(x: Tensor, weight: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    y = scale * x * x
    return (y if weight is None else y * weight), y.new_ones(1)


@scaled_square.register_fake
def _(x, weight, scale):
    return torch.empty_like(x), x.new_empty(1)


def _save(ctx, arguments, results):
    x, weight, ctx.scale = arguments
    ctx.save_for_backward(x, weight)
    ctx.mark_non_differentiable(results[1])


def _backward(ctx, dy, unused):
    x, weight = ctx.saved_tensors
    dx = 2 * ctx.scale * x * dy
    return (dx, None, None) if weight is None else (dx * weight, ctx.scale * x * x * dy, None)


scaled_square.register_autograd(_backward, _save)


@pytest.fixture
def x():
    return torch.randn(5, dtype=torch.float64, requires_grad=True)


@pytest.fixture(params=[False, True])
def weight(request):
    return torch.randn(5, dtype=torch.float64, requires_grad=True) if request.param else None


def test_it_is_well_registered(x, weight):
    torch.library.opcheck(scaled_square.node, (x, weight, 3.0))


@pytest.mark.parametrize("around", ["eager", "checkpoint", "compile"])
def test_its_gradients(x, weight, around):
    def call(x, weight):
        return scaled_square(x, weight, 3.0)[0]

    if around == "checkpoint":
        found = checkpoint(call, x, weight, use_reentrant=False)
    else:
        found = (torch.compile(call, backend="aot_eager", fullgraph=True) if around == "compile" else call)(x, weight)
    exact = 3 * x.square() * (1 if weight is None else weight)
    inputs = [x] if weight is None else [x, weight]
    torch.testing.assert_close(found, exact)
    for actual, expected in zip(
        torch.autograd.grad(found.sin().sum(), inputs), torch.autograd.grad(exact.sin().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_modes_see_one_node(x):
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            seen.append(str(function))
            return function(*arguments, **(keywords or {}))

    with Watch():
        scaled_square(x, None, 3.0)
    assert seen == ["loglinear.scaled_square.default"]


def test_nothing_is_recorded_without_need(x, weight):
    with torch.no_grad():
        assert not scaled_square(x, weight, 3.0)[0].requires_grad
    assert not scaled_square(x.detach(), None, 3.0)[0].requires_grad
    y, ones = scaled_square(x, weight, 3.0)
    assert y.requires_grad and not ones.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(scaled_square(x, weight, 3.0)[0], y.detach())


def test_default_values_are_refused():
    def with_default(x: Tensor, scale: float = 1.0) -> Tensor:
        return x * scale

    with pytest.raises(TypeError, match="with_default must have no default values"):
        Operator(with_default)

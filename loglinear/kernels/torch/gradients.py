"""The gradients of a registered operator, of every order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register_gradients(
    node: Any, backward: Any, stages: Callable[..., tuple[Tensor, Tensor]], differentiable: int
) -> None:
    """Give the operator `node` its gradients, and their operator `backward` its fake.

    The first `differentiable` arguments of `node` have gradients, unless they are None. Then come position, cu_seqlens,
    rows, a size, final and partition. `backward` takes the gradients of both outputs in front of them. It returns those
    of the arguments that are there. Autograd records `stages`, which computes the same as `node`, for higher
    derivatives.
    """

    @backward.register_fake
    def _(dout, dblocks, *arguments):  # type: ignore[no-untyped-def]
        tensors = (x for x in arguments[:differentiable] if x is not None)
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, rows, size, final, partition = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.options = rows, size, final, partition

    def give(ctx: Any, dout: Tensor | None, dblocks: Tensor | None):  # type: ignore[no-untyped-def]
        saved, options = ctx.saved_tensors, ctx.options  # once: checkpointing refuses to give them twice
        tensors, where = saved[:differentiable], saved[differentiable:]
        dblocks = dblocks if options[2] else None  # without `final` they are empty, and so is their gradient
        if torch.is_grad_enabled():  # create_graph=True
            grads = recorded_gradients(lambda *x: stages(*x, *where, *options), tensors, (dout, dblocks))
        else:
            dtensors = iter(backward(dout, dblocks, *saved, *options))
            grads = [None if x is None else next(dtensors) for x in tensors]
        return *grads, *[None] * (len(where) + len(options))

    node.register_autograd(give, setup_context=save)


def recorded_gradients(function: Any, inputs: tuple[Tensor | None, ...], douts: tuple[Tensor | None, ...]):  # type: ignore[no-untyped-def]
    """Return the gradients of a function that autograd can record, or None for inputs that need none.

    They have a graph of their own, so that they have gradients too.
    """
    # An input that is given twice is two inputs here.
    apart = [None if x is None else x.view_as(x) for x in inputs]
    with torch.autocast(next(x for x in inputs if x is not None).device.type, enabled=False):
        outputs = function(*apart)
    pairs = [(y, dy) for y, dy in zip(outputs, douts, strict=True) if dy is not None and y.requires_grad]
    wanted = [x for x in apart if x is not None and x.requires_grad]
    ys, dys = [y for y, _ in pairs], [dy for _, dy in pairs]
    grads = iter(torch.autograd.grad(ys, wanted, dys, create_graph=True, allow_unused=True))
    return [next(grads) if x is not None and x.requires_grad else None for x in apart]

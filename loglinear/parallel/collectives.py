"""The collectives of a layer, with their gradients: torch.distributed does all of the sending."""

# R ranks
from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

between_graphs = torch._disable_dynamo
"""Decorates a function with collectives, whose backward nodes a graph would leave out where no gradient reaches them.

torch.compiler.disable would import the compiler. No graph could hold the integers of a slice either.
"""


class _AllGather(torch.autograd.Function):
    """[...] of every rank to [R, ...] on every rank; the gradient of a rank's part is the sum over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = x.new_empty(dist.get_world_size(group), *x.shape)
        dist.all_gather(list(gathered.unbind(0)), x.contiguous(), group)
        return gathered

    @staticmethod
    def backward(ctx: Any, dgathered: Tensor) -> tuple[Tensor, None]:
        dx = dgathered.new_empty(dgathered.shape[1:])
        dist.reduce_scatter(dx, list(dgathered.contiguous().unbind(0)), group=ctx.group)
        return dx, None


class _Joined(torch.autograd.Function):
    """x as it is; the other tensors get no gradient, but their nodes run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = len(others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        return dx, *[None] * ctx.others


class _Sum(torch.autograd.Function):
    """The sum of all ranks; the gradient is that of this rank's part, times R."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.ranks = dist.get_world_size(group)
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, None]:
        return dtotal * ctx.ranks, None


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return [R, ...], the x [...] of every rank; the backward pass is one reduce-scatter."""
    return _AllGather.apply(x, group)


def joined(x: Tensor, *others: Tensor | None) -> Tensor:
    """Return x, as if it had been made of the others too.

    Every rank must take part in every backward collective. So a rank joins both ends, even if it sends nothing or reads
    nothing.
    """
    return _Joined.apply(x, *(other for other in others if other is not None))


def mean_gradient_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of x over all ranks, so that the mean of all ranks' gradients is the gradient of the sum."""
    return _Sum.apply(x, group)

"""The collectives of a layer, with their gradients: torch.distributed does all of the sending."""

# R ranks
from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

between_graphs = torch._disable_dynamo
"""Keep a function with collectives out of compiled graphs, which leave out backward nodes that no gradient reaches.

No graph could hold the integers of a slice either. torch.compiler.disable would import the compiler.
"""


class _AllGather(torch.autograd.Function):
    """[...] of every rank to [R, ...] on every rank; the gradient of a rank's part is the sum over all ranks.

    The sum is computed in float32, or float64 for float64: it may have R terms.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = x.new_empty(dist.get_world_size(group), *x.shape)
        dist.all_gather(list(gathered.unbind(0)), x.contiguous(), group)
        return gathered

    @staticmethod
    def backward(ctx: Any, dgathered: Tensor) -> tuple[Tensor, None]:
        parts = dgathered.to(torch.promote_types(dgathered.dtype, torch.float32)).contiguous()
        dx = parts.new_empty(parts.shape[1:])
        dist.reduce_scatter(dx, list(parts.unbind(0)), group=ctx.group)
        return dx.to(dgathered.dtype), None


class _Joined(torch.autograd.Function):
    """x, unchanged. The other tensors get no gradient, but their backward nodes run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = len(others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        return dx, *[None] * ctx.others


class _Sum(torch.autograd.Function):
    """The sum over all ranks; the gradient is R times that of this rank's part."""

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
    """Return x, so that its backward pass also runs that of the others.

    Every rank must take part in every backward collective, even a rank that sends or reads nothing. So the message is
    joined to the operands, and the output to the gathered messages.
    """
    return _Joined.apply(x, *(other for other in others if other is not None))


def mean_gradient_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of x over all ranks, so that the mean of all ranks' gradients is the gradient of the sum."""
    return _Sum.apply(x, group)

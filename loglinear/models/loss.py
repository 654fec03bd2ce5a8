# B batch, T time, N = B T, D hidden size, V vocabulary
"""The language-model loss in slices, without float32 logits of the whole sequence."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from loglinear.layers.slices import Slice

IGNORE = -100


def sliced_cross_entropy(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    *,
    slice_size: int,
    num_items: Tensor | int | None = None,
    slices: Slice | None = None,
) -> Tensor:
    """Return the cross-entropy (nats) of head(hidden), summed over targets != -100 and divided by their number.

    Args:
        head: Makes logits [n, V] of hidden states [n, D].
        hidden: [B, T, D].
        targets: [B, T], -100 where nothing is to be predicted.
        slice_size: Tokens whose float32 logits exist at the same time, in the forward and the backward pass.
        num_items: Replaces the number of targets (gradient accumulation: the count over all batches of a step).
        slices: This device's part of rows that lie on several devices. The result is that of all devices.
    """
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    parts = zip(hidden.flatten(0, 1).split(slice_size), targets.flatten().split(slice_size), strict=True)
    for hidden_slice, target_slice in parts:
        total = total + checkpoint(
            _slice_loss, head, hidden_slice, target_slice, use_reentrant=False, preserve_rng_state=False
        )
    if num_items is None:
        targeted = (targets != IGNORE).sum()
        num_items = (targeted if slices is None else slices.sum(targeted)).clamp(min=1)
    total = total if slices is None else slices.sum(total)
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


def _slice_loss(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the summed loss of one slice."""
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")

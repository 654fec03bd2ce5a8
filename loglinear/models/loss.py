# B batch, T time, N = B T, D hidden size, V vocabulary
"""The language-model loss in slices: float32 logits of the whole sequence never exist."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100


def next_token_targets(labels: Tensor, cu_seqlens: Tensor | None = None, real: Tensor | None = None) -> Tensor:
    """Targets [B, T]: for each token the label [B, T] of the next one, -100 where nothing is to be predicted.

    `real` [B, T] marks the tokens of a padded batch: padding predicts nothing and is nobody's target, wherever it
    stands, and the next token is the next real one of the row. The first token of a packed document is nobody's target.
    """
    if real is not None:
        following = _next_real(real)
        padded = F.pad(labels, (0, 1), value=IGNORE)
        return padded.gather(1, following).masked_fill(~real, IGNORE)
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    if cu_seqlens is not None:
        # Empty documents name the token before them, and at the row's start its last one: neither has a next token.
        targets = targets.index_fill(1, (cu_seqlens[1:].long() - 1) % labels.shape[1], IGNORE)
    return targets


def _next_real(real: Tensor) -> Tensor:
    """For each column [B, T] the first real one behind it, T where there is none."""
    time = real.shape[1]
    column = torch.where(real, torch.arange(time, device=real.device), time)
    behind = F.pad(column[:, 1:], (0, 1), value=time)
    return behind.flip(1).cummin(1).values.flip(1)


def sliced_cross_entropy(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    *,
    slice_size: int,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy (nats) of head(hidden) against targets, summed over targets != -100 and divided by their number.

    hidden [B, T, D], targets [B, T]; `head` makes logits [n, V] of hidden states [n, D]. Logits exist for `slice_size`
    tokens at a time, in float32, and again in the backward. `num_items` replaces the number of targets (gradient
    accumulation: the count over all batches of a step).
    """
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    slices = zip(hidden.flatten(0, 1).split(slice_size), targets.flatten().split(slice_size), strict=True)
    for hidden_slice, target_slice in slices:
        total = total + checkpoint(
            _slice_loss, head, hidden_slice, target_slice, use_reentrant=False, preserve_rng_state=False
        )
    count = (targets != IGNORE).sum().clamp(min=1) if num_items is None else num_items
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def _slice_loss(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")

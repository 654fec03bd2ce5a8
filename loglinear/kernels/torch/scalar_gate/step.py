"""One token of every sequence."""

# N sequences, C chunk, M blocks, H heads, G groups, K key, V value, L levels
from __future__ import annotations

from torch import Tensor

from loglinear.kernels.torch.chunks import suffix_sums
from loglinear.kernels.torch.step import merge_full, read_blocks, row_products, row_scales, rows_to_merge, until
from loglinear.partition import Partition


def scalar_gate_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    level_scales: Tensor,
    blocks: Tensor,
    position: Tensor,
    full: Tensor,
    partition: Partition,
) -> Tensor:
    """q [N,G,K] and level_scales [N,H,L] of the new tokens; k [N,C,G,K], v [N,C,H,V], log_decay [N,C,H] or [N,C,H,K]
    of the chunks with the new tokens in them; blocks [N,M,H,K,V]; position [N] of the new tokens; full [N]: which
    chunks they fill.

    Returns the outputs [N,H,V], and joins the chunks that are full into their rows' blocks, in place.
    """
    C, R = k.shape[1], v.shape[2] // k.shape[2]
    seen, to_place, to_blocks = row_scales(level_scales, position, C, blocks.shape[1], partition)
    log_decay = until(seen, log_decay)
    to_end, from_start = suffix_sums(log_decay, -2).exp(), log_decay.sum(-2).exp()  # [N, H, C, D], [N, H, D]
    weights = row_products(q, k.transpose(1, 2), to_end) * to_place
    out = (weights[..., None, :] @ v.transpose(1, 2))[..., 0, :]
    out = out + read_blocks(q.repeat_interleave(R, 1) * from_start, blocks, to_blocks)
    rows = rows_to_merge(full)
    if rows is None:
        return out
    before, past = blocks[rows], from_start[rows]
    keys = k[rows].transpose(1, 2).repeat_interleave(R, 1) * to_end[rows]
    state = keys.mT @ v[rows].transpose(1, 2)
    chunks = position[rows] // C + 1
    blocks[rows] = merge_full(before, before * past[:, None, ..., None], state, chunks, full[rows], C, partition)
    return out

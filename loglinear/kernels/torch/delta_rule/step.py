"""One token of every sequence."""

# N sequences, C chunk, M blocks, H heads, G groups, K key, V value, L levels
from __future__ import annotations

import torch
from torch import Tensor

from loglinear.kernels.torch.chunks import suffix_sums
from loglinear.kernels.torch.delta_rule.chunk import chunk_quantities, chunk_state
from loglinear.kernels.torch.gate import gate_of
from loglinear.kernels.torch.step import merge_full, read_blocks, row_products, row_scales, rows_to_merge, until
from loglinear.partition import Partition


def chunk_inverse(k: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    """A = (I + tril(diag(b) K K^T * dec, -1))^-1 of each chunk, by its rows: k [N,C,G,K], beta [N,C,H], log_decay
    [N,C,H] or [N,C,H,K] -> [N,C,H,C]. Row i depends on the tokens up to i alone."""
    keys, strength = k.transpose(1, 2).repeat_interleave(beta.shape[2] // k.shape[2], 1), beta.transpose(1, 2)
    return chunk_quantities(keys, strength, gate_of(log_decay.transpose(1, 2))).inverse_CC.transpose(1, 2)


def append_inverse_row(inverse: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, place: Tensor) -> None:
    """Writes A's row of the new token, e_i - N_i A, in place."""
    N, C = k.shape[:2]
    row = torch.arange(N, device=place.device)
    places, end = torch.arange(C, device=place.device), place[:, None, None]
    earlier = places < end
    decay = suffix_sums(until(places <= end, log_decay), -2).exp()
    erased = row_products(k[row, place], k.transpose(1, 2), decay)
    erased = torch.where(earlier, erased * beta[row, place][..., None], 0.0)
    identity = (places == end).to(inverse.dtype)
    made = identity - (erased[..., None, :] @ inverse.transpose(1, 2))[..., 0, :]
    inverse[row, place] = torch.where(earlier, made, identity)


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    inverse: Tensor,
    level_scales: Tensor,
    blocks: Tensor,
    position: Tensor,
    full: Tensor,
    partition: Partition,
) -> Tensor:
    """As `scalar_gate_step`, with beta [N,C,H] and the chunks' inverses [N,C,H,C], by their rows. The
    token's row of the effective attention is e = (q K^T * dec) A diag(b)."""
    C, R, K = k.shape[1], v.shape[2] // k.shape[2], k.shape[3]
    seen, to_place, to_blocks = row_scales(level_scales, position, C, blocks.shape[1], partition)
    keys, values = k.transpose(1, 2).repeat_interleave(R, 1), v.transpose(1, 2)  # [N, H, C, K], [N, H, C, V]
    strength, log_decay = beta.transpose(1, 2), until(seen, log_decay)
    scores = row_products(q, k.transpose(1, 2), suffix_sums(log_decay, -2).exp())
    scores = torch.where(seen, scores, 0.0)
    effective = (scores[..., None, :] @ inverse.transpose(1, 2))[..., 0, :] * strength
    out = ((effective * to_place)[..., None, :] @ values)[..., 0, :]
    from_start = log_decay.cumsum(-2).exp()
    x = q.repeat_interleave(R, 1) * from_start[..., -1, :]
    x = x - (effective[..., None, :] @ (keys * from_start))[..., 0, :]
    out = out + read_blocks(x, blocks, to_blocks)
    rows = rows_to_merge(full)
    if rows is None:
        return out
    before, keys, values = blocks[rows], keys[rows], values[rows]
    slots = q.new_empty(*keys.shape[:2], K, K + v.shape[3])
    chunk_state(chunk_quantities(keys, strength[rows], gate_of(log_decay[rows])), values, out=slots)
    chunks = position[rows] // C + 1
    blocks[rows] = merge_full(
        before, slots[:, None, ..., :K] @ before, slots[..., K:], chunks, full[rows], C, partition
    )
    return out

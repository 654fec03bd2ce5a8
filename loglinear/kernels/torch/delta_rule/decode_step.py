"""One token of every sequence."""

# N sequences, C chunk, M blocks, H heads, G groups, K key, V value, L levels
from __future__ import annotations

import torch
from torch import Tensor

from loglinear.kernels.torch.decode import merge_full, read_blocks, row_scales
from loglinear.kernels.torch.delta_rule.chunk import chunk_quantities, chunk_state
from loglinear.kernels.torch.tiles import decay_matrix, suffix_sums


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    level_scales: Tensor,
    blocks: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    """As the scalar gate's `decode_step`, with beta [N,C,H]. The token's row e of the effective attention E solves
    x (I + tril(diag(b) K K^T * dec, -1)) = q K^T * dec,  e = x diag(b)."""
    C, R, K = k.shape[1], v.shape[2] // k.shape[2], k.shape[3]
    place = position % C
    to_place, to_blocks = row_scales(level_scales, place, C, blocks.shape[1])
    keys, values = k.transpose(1, 2).repeat_interleave(R, 1), v.transpose(1, 2)  # [N, H, C, K], [N, H, C, V]
    queries, strength = q.repeat_interleave(R, 1), beta.transpose(1, 2)
    log_decay = log_decay.transpose(1, 2)  # 0 behind the new token, whose place is so the chunk's end
    scores = (queries[..., None, :] @ keys.mT) * suffix_sums(log_decay).exp()[..., None, :]
    erase = (strength[..., None] * (keys @ keys.mT) * decay_matrix(log_decay)).tril(-1)
    identity = torch.eye(C, dtype=q.dtype, device=q.device)
    effective = torch.linalg.solve_triangular(identity + erase, scores, upper=False, left=False, unitriangular=True)
    effective = effective[..., 0, :] * strength
    out = ((effective * to_place)[..., None, :] @ values)[..., 0, :]
    from_start = log_decay.cumsum(-1).exp()[..., None]
    seen = queries * from_start[..., -1, :] - (effective[..., None, :] @ (keys * from_start))[..., 0, :]
    out = out + read_blocks(seen, blocks, to_blocks)
    full = place == C - 1
    if bool(full.any()):
        slots = q.new_empty(*keys.shape[:2], K, K + v.shape[3])
        chunk_state(chunk_quantities(keys, strength, log_decay), values, out=slots)
        transported = slots[:, None, ..., :K] @ blocks
        blocks = merge_full(blocks, transported, slots[..., K:], position // C + 1, full)
    return out, blocks

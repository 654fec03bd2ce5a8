"""The token-by-token definition: one state per column of lambda (a level, for radix 2), rewritten at every step.

At position t:

    1. apply token t's transition to every state
    2. add the new write to column 0
    3. read every column with its lambda
    4. move every state to the column in which position t + 1 sees its tokens; states that meet are added

    gate       :  S <- Diag(a_t) S                          write k_t v_t^T
    delta rule :  S <- (I - b_t k_t k_t^T) Diag(a_t) S      write b_t k_t v_t^T

The decay a_t is one number (a scalar gate), or one for each channel of the keys (a diagonal gate).

Source: arXiv 2506.04761, sections 3.1 and 3.3; arXiv 2312.06635 and 2510.26692 (diagonal gates).
"""

# T time, H heads, K key, V value, L levels; one sequence.
from __future__ import annotations

import torch
from torch import Tensor

from loglinear.partition import FENWICK, Partition


def moved(states_LHKV: Tensor, position: int, partition: Partition = FENWICK) -> Tensor:
    """Return the states of the columns as seen from `position`; they are given as seen from the position before."""
    columns = torch.tensor(partition.next_columns(position, len(states_LHKV)), device=states_LHKV.device)
    return torch.zeros_like(states_LHKV).index_add(0, columns, states_LHKV)


def step(states_LHKV: Tensor, k_HK: Tensor, v_HV: Tensor, decay: Tensor, beta_H: Tensor | None) -> Tensor:
    """Return all states after one token; the decay is [H] or [H, K]."""
    decay_HD = decay[:, None] if decay.dim() == 1 else decay
    states = decay_HD[..., None] * states_LHKV
    write = k_HK[:, :, None] * v_HV[:, None, :]
    if beta_H is not None:
        write = beta_H[:, None, None] * write
        erased = torch.einsum("hk,lhkv->lhv", k_HK, states)
        states = states - torch.einsum("h,hk,lhv->lhkv", beta_H, k_HK, erased)
    return torch.cat([states[:1] + write, states[1:]])


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    level_scales: Tensor,
    states_LHKV: Tensor,
    position: int = 0,
    partition: Partition = FENWICK,
) -> tuple[Tensor, Tensor]:
    """Return the outputs [T, H, V] of one sequence, and the states [L, H, K, V] as seen from the next position.

    Args:
        q: [T, H, K].
        k: [T, H, K].
        v: [T, H, V].
        log_decay: [T, H], or [T, H, K] for a diagonal gate.
        beta: [T, H], or None without the delta rule.
        level_scales: [T, H, L].
        states_LHKV: The states as seen from the first token.
        position: The position of the first token.
        partition: The partition of the past, which assigns every earlier token to a column.
    """
    outputs = []
    for t in range(q.shape[0]):
        beta_H = None if beta is None else beta[t]
        states_LHKV = step(states_LHKV, k[t], v[t], log_decay[t].exp(), beta_H)
        outputs.append(torch.einsum("hl,hk,lhkv->hv", level_scales[t], q[t], states_LHKV))
        states_LHKV = moved(states_LHKV, position + t + 1, partition)
    return torch.stack(outputs) if outputs else v, states_LHKV


def states_from_blocks(blocks_MHKV: Tensor, num_columns: int, chunk_size: int, partition: Partition) -> Tensor:
    """Return the states of all columns at a chunk's start: those of chunks are the blocks, the others are empty."""
    columns = [torch.zeros_like(blocks_MHKV[0])] * num_columns
    for number, block in enumerate(blocks_MHKV):
        columns[partition.block_column(number, num_columns, chunk_size)] = block
    return torch.stack(columns)

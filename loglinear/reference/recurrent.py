"""The token-by-token definition: one state per level, rewritten at every step.

At position t:

    1. merge levels 0 .. ctz(t) into the next level
    2. apply token t's transition to every level
    3. set level 0 to the new write
    4. read every level with its lambda

    scalar gate :  S <- a_t S                          write k_t v_t^T
    delta rule  :  S <- a_t (I - b_t k_t k_t^T) S      write b_t k_t v_t^T

Source: arXiv 2506.04761, sections 3.1 and 3.3.
"""

# T time, H heads, K key, V value, L levels; one sequence.
from __future__ import annotations

import torch
from torch import Tensor

from loglinear.fenwick import block_level, merge_height


def merged(states_LHKV: Tensor, position: int) -> Tensor:
    """Return the level states after the merge that precedes the step of token ``position``."""
    last = states_LHKV.shape[0] - 1
    if position == 0 or last == 0:
        return states_LHKV
    target = min(merge_height(position) + 1, last)
    joined = states_LHKV[: target + 1].sum(0, keepdim=True)
    return torch.cat([torch.zeros_like(states_LHKV[:target]), joined, states_LHKV[target + 1 :]])


def step(
    states_LHKV: Tensor, position: int, k_HK: Tensor, v_HV: Tensor, decay_H: Tensor, beta_H: Tensor | None
) -> Tensor:
    """Return all level states after one token."""
    states = merged(states_LHKV, position)
    write = k_HK[:, :, None] * v_HV[:, None, :]
    if beta_H is not None:
        write = beta_H[:, None, None] * write
        erased = torch.einsum("hk,lhkv->lhv", k_HK, states)
        states = states - torch.einsum("h,hk,lhv->lhkv", beta_H, k_HK, erased)
    states = decay_H[:, None, None] * states
    if states.shape[0] == 1:  # one level holds everything: the linear model
        return states + write
    return torch.cat([write[None], states[1:]])


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    level_scales: Tensor,
    states_LHKV: Tensor,
    position: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the outputs [T, H, V] of one sequence, and the level states after its last token.

    Args:
        q: [T, H, K].
        k: [T, H, K].
        v: [T, H, V].
        log_decay: [T, H].
        beta: [T, H], or None for the scalar gate.
        level_scales: [T, H, L].
        states_LHKV: The level states before the merge of the first token.
        position: The position of the first token.
    """
    outputs = []
    for t in range(q.shape[0]):
        beta_H = None if beta is None else beta[t]
        states_LHKV = step(states_LHKV, position + t, k[t], v[t], log_decay[t].exp(), beta_H)
        outputs.append(torch.einsum("hl,hk,lhkv->hv", level_scales[t], q[t], states_LHKV))
    return torch.stack(outputs) if outputs else v, states_LHKV


def level_states_from_blocks(blocks_MHKV: Tensor, num_levels: int, chunk_size: int) -> Tensor:
    """Return the level states at a chunk's start: block m is level log2(C) + 1 + m, and lower levels are empty."""
    levels = [torch.zeros_like(blocks_MHKV[0])] * num_levels
    for m, block in enumerate(blocks_MHKV):
        levels[block_level(m, num_levels, chunk_size)] = block
    return torch.stack(levels)

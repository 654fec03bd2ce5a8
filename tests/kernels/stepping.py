"""Decoding states with arbitrary contents at chosen positions, and their steps."""

from __future__ import annotations

import torch
from torch import Tensor

from loglinear.ops import DecodeState, FenwickState, log_linear_attention_step, log_linear_delta_rule_step
from loglinear.partition import FENWICK, Partition
from tests.ops.operators import Operator


def step_of(operator: Operator):
    return log_linear_delta_rule_step if operator.delta else log_linear_attention_step


def full_state(
    operator: Operator, partition: Partition, positions: list[int], columns: int, C: int, device: str = "cpu", **sizes
) -> FenwickState:
    """A float64 state whose every number is random, those that are not of the past too; rows at these positions."""
    dims = dict(groups=1, heads=1, key_dim=6, value_dim=3, **operator.kind) | sizes
    start = dict(position=torch.tensor(positions), partition=partition, dtype=torch.float64)
    state = FenwickState.zeros(len(positions), num_levels=columns, chunk_size=C, **start, **dims)
    assert state.chunk_size == C
    state.blocks.normal_()
    state.k.copy_(torch.nn.functional.normalize(torch.randn_like(state.k), dim=-1))
    state.v.normal_()
    state.log_decay.uniform_(-0.1, 0)
    if state.beta is not None:
        state.beta.uniform_(0, 0.5)  # old blocks keep some of their size
    return state.with_tensors(x.to(device) for x in state.tensors)


def decoding(state: FenwickState, dtype: torch.dtype = torch.float64) -> DecodeState:
    return DecodeState.of(state.with_tensors(x.to(dtype) if x.is_floating_point() else x for x in state.tensors))


def tokens_for(operator: Operator, state: FenwickState, steps: int, columns: int) -> list[dict[str, Tensor]]:
    """One float64 token for every row and step."""
    (N, _, H, K, V), G = state.blocks.shape, state.k.shape[2]
    inputs = operator.inputs(B=N, T=steps, G=G, H=H, K=K, V=V, L=columns)
    inputs = {name: x.detach().to(state.k.device) for name, x in inputs.items()}
    return [{name: x[:, t] for name, x in inputs.items()} for t in range(steps)]


def blocks_error(actual: DecodeState, expected: DecodeState) -> float:
    """The largest error of a block of the past, over the row's largest block; infinite at different positions."""
    state, exact = actual.fenwick, expected.fenwick
    if not torch.equal(state.position, exact.position):
        return float("inf")
    M, C, partition = state.blocks.shape[1], state.chunk_size, state.partition or FENWICK
    chunks = (exact.position // C).tolist()
    held = torch.tensor([[partition.has_block(n, m, M, C) for m in range(M)] for n in chunks]).to(state.blocks.device)
    held = held[..., None, None, None]
    errors, blocks = (
        torch.where(held, x, 0.0).flatten(2) for x in (state.blocks.double() - exact.blocks, exact.blocks)
    )
    return float(
        (errors.norm(dim=2).amax(1) / blocks.norm(dim=2).amax(1).clamp(min=1e-300)).nan_to_num(torch.inf).max()
    )


def sparse_tokens(operator, state, columns):
    """A state in the middle of a chunk, with NaN in the blocks whose lambda is 0 in the token; and one with 0 there."""
    token = tokens_for(operator, state, 1, columns)[0]
    scales = token["level_scales"] = token["level_scales"].clone()
    scales[..., 1::2] = 0
    M = state.blocks.shape[1]
    dropped = (scales[..., -M:] == 0).mT[..., None, None].expand_as(state.blocks)
    poisoned = state._replace(blocks=state.blocks.masked_fill(dropped, torch.nan))
    return token, poisoned, state._replace(blocks=state.blocks.masked_fill(dropped, 0.0))

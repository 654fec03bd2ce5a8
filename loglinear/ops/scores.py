"""The scores of buckets: how well a bucket's keys match a query. The routed read makes its weights of them.

    score(t, b) = q_t^T M_b q_t - n_b / K,    M_b = sum of k_s k_s^T over the n_b tokens s of bucket b

q and k are scaled to length 1. The score is the sum of (q_t . k_s)^2, minus 1 / K for each token. The mean of
(q . k)^2 for a random key is 1 / K. Column 0, the token's own finest block, has the score 0. Decay and write strength
do not enter the score.

The sums M_b of earlier blocks are a state of `log_linear_attention` with keys as values and without decay. A chunk is
one finest block. So sequences continue, and steps work, as they do for the operators. The state also knows the position
of each sequence's first token. The tokens n_b count from there.
"""

# B batch, T time, G query/key groups, K key, L columns, N sequences, M blocks
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from string import ascii_lowercase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loglinear.kernels import torch as kernels
from loglinear.kernels.unchanging import once
from loglinear.ops import impl_reference, scores_triton
from loglinear.ops.announcement import announce
from loglinear.ops.continuation import final_state, in_one_row, places_in_one_row, sequence_of
from loglinear.ops.impl_torch import records_stages
from loglinear.ops.problem import Problem, unit_length
from loglinear.ops.state import FenwickState, empty_state
from loglinear.ops.validation import (
    INTEGERS,
    Sizes,
    check_partition,
    check_tensor,
    one_of,
    whole_number,
    working_dtype,
)
from loglinear.partition import Partition

SCORES = ("auto", "triton", "torch", "reference")


class BucketScores(NamedTuple):
    """The result of `bucket_scores`."""

    scores: Tensor
    """[B, T, G, L] in float32 (float64 for float64 inputs); 0 for column 0 and for empty buckets."""
    tokens: Tensor
    """[B or 1, T, L] int64, the tokens n_b of each bucket; see `bucket_tokens`."""
    final_state: FenwickState | None
    """The sums after the last token; None without output_final_state=True."""


def bucket_scores(
    q: Tensor,
    k: Tensor,
    *,
    num_columns: int,
    partition: Partition,
    initial_state: FenwickState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> BucketScores:
    """Return the score of every bucket for every query.

        score(t, b) = sum over the tokens s of bucket b of ((q_t . k_s)^2 - 1 / K),    q and k scaled to length 1

    The memory is one K x K sum for each chunk and group, some groups at a time, plus the scores. With states, and with
    impl="torch", a chunk is a finest block. Otherwise it is a block of about 64 tokens. NaN and infinities are not
    refused. They reach the scores of their group, as they reach the outputs of `log_linear_attention`.

    Args:
        q: [B, T, G, K], the queries.
        k: [B, T, G, K], the keys.
        num_columns: L. The last column is one bucket with everything older.
        partition: The rule that assigns past tokens to buckets.
        initial_state: The final_state to continue from, one row for each sequence; None starts new sequences.
        output_final_state: True to also return the sums after the last token.
        cu_seqlens: [N + 1], the boundaries of packed sequences (B = 1), as in the operators.
        impl: "auto", "triton" (kernels for a GPU), "torch" (any device) or "reference" (the recurrence). "auto" chooses
            triton on a GPU if it supports the call, and torch otherwise. A log line says which one, and why not triton.

    Returns:
        `BucketScores(scores, tokens, final_state)`: scores is [B, T, G, L] and has gradients, tokens is
            [B or 1, T, L]. 16-bit inputs are computed in float32, by triton with 16-bit products.

    Raises:
        ValueError: A shape, dtype, state or cu_seqlens does not fit, or impl="triton" does not support the call. The
            message names the argument.

    Source: this library; see docs/learn/routed-reads.md.
    """
    one_of("impl of bucket_scores", impl, SCORES)
    L = whole_number("num_columns", num_columns)
    problem = _problem(q, k, L, partition, initial_state, output_final_state, cu_seqlens)
    chosen, reason = _automatic(problem) if impl == "auto" else (impl, None)
    announce("bucket_scores", chosen, reason)
    with torch.autocast(q.device.type, enabled=False):
        tokens = _tokens(problem, L)
        if chosen == "triton":
            scores, final = scores_triton.run(scores_triton.prepared(problem), L)
        else:
            found, final = (_torch if chosen == "torch" else _reference)(_of_length_1(problem), L)
            scores = without_own(found) - (without_own(tokens).to(found.dtype) / q.shape[3])[:, :, None]
        if problem.initial_state is not None:
            scores = torch.where((tokens > 0)[:, :, None], scores, 0.0)  # a state may have any numbers before its first
    return BucketScores(scores, tokens, final)


def _automatic(problem: Problem) -> tuple[str, str | None]:
    """Return the implementation that "auto" chooses, and the reason why it is not triton on a GPU."""
    is_step = problem.initial_state is not None and problem.v.shape[1] == 1
    if problem.v.device.type != "cuda" or is_step:
        return "torch", None
    reason = scores_triton.unsupported(scores_triton.prepared(problem))
    return ("triton", None) if reason is None else ("torch", reason)


def bucket_tokens(position: Tensor, *, num_columns: int, partition: Partition, first: Tensor | None = None) -> Tensor:
    """Return n_b, the number of tokens in every bucket, as the tokens at these positions see it.

        n_b = max(end - max(begin, first), 0)    of a bucket of the positions from begin to end - 1

    Examples:
        >>> bucket_tokens(torch.tensor([0, 3, 10]), num_columns=3, partition=Partition(4, 2)).tolist()
        [[1, 0, 0], [2, 2, 0], [1, 2, 8]]
        >>> bucket_tokens(torch.tensor([10]), num_columns=3, partition=Partition(4, 2), first=torch.tensor(5)).tolist()
        [[1, 2, 3]]

    Args:
        position: Integers of any shape.
        num_columns: L.
        partition: The partition of the past.
        first: Integers that broadcast to the shape of position: where each token's sequence starts. None: at 0.

    Returns:
        [..., L] int64. Column 0 counts the token itself. A bucket with 0 tokens is empty. A position before `first`
            sees no token.

    Raises:
        ValueError: An argument does not fit. The message names it.
    """
    check_partition("partition", partition)
    L, f = whole_number("num_columns", num_columns), partition.finest_block
    check_tensor("position", position, ascii_lowercase[: getattr(position, "ndim", 0)], {}, None, INTEGERS)
    position = position.long()
    if L == 1:
        held = position[..., None] + 1
    else:
        flat = position.flatten()
        older = kernels.block_tokens(flat // f, partition.num_blocks(L, f), f, partition)
        held = torch.cat([(flat % f + 1)[:, None], older], 1).view(*position.shape, L)
    if first is None:
        return held
    check_tensor("first", first, ascii_lowercase[: getattr(first, "ndim", 0)], {}, position.device, INTEGERS)
    shape = first.shape
    if len(shape) > position.dim() or any(
        n not in (1, m) for n, m in zip(shape[::-1], position.shape[::-1], strict=False)
    ):
        raise ValueError(f"first must broadcast to the shape {list(position.shape)} of position, got {list(shape)}")
    return kernels.tokens_from(first.long(), held, position + 1)


def zero_sums(
    rows: int,
    *,
    num_columns: int,
    groups: int,
    key_dim: int,
    partition: Partition,
    position: Tensor | None = None,
    **how: Any,
) -> FenwickState:
    """Return the sums of sequences that have no token yet; position, dtype and device as in `FenwickState.zeros`."""
    return empty_state(
        rows,
        num_levels=num_columns,
        chunk_size=partition.finest_block,
        groups=groups,
        heads=groups,
        key_dim=key_dim,
        value_dim=key_dim,
        delta_rule=False,
        partition=partition,
        position=position,
        **how,
    )


def _problem(
    q: Tensor,
    k: Tensor,
    L: int,
    partition: Partition,
    state: FenwickState | None,
    final: bool,
    cu_seqlens: Tensor | None,
) -> Problem:
    """Return the checked call of the operator that has the keys as values."""
    check_partition("partition", partition)
    sizes: Sizes = {}
    check_tensor("q", q, "BTGK", sizes)
    check_tensor("k", k, "BTGK", sizes, q.device)
    nothing = q.new_zeros(1).expand(*q.shape[:3], L)
    call = Problem(q, k, k, None, None, nothing, 1.0, state, final, cu_seqlens, partition.finest_block, partition)
    return call.checked(delta_rule=False)


def _of_length_1(problem: Problem) -> Problem:
    """Return the call with q and k of length 1."""
    dtype = working_dtype(problem.operands)
    q, k = unit_length(problem.q.to(dtype)), unit_length(problem.k.to(dtype))
    return replace(problem, q=q, k=k, v=k, level_scales=problem.level_scales.to(dtype))


def _torch(problem: Problem, L: int) -> tuple[Tensor, FenwickState | None]:
    """Return q_t^T M_b q_t [B, T, G, L] and the final state, by the Fenwick array, on any device."""
    p, N = problem.in_working_dtype(), problem.num_sequences
    state = p.initial_state
    q, k = in_one_row(p.q, state), in_one_row(p.k, state, state and state.k)
    position, initial = (None, None) if state is None else (state.position, (state.blocks + state.blocks.mT) / 2)
    compute = kernels.energies if records_stages() else kernels.bucket_energies
    found, blocks = compute(q, k, initial, position, p.cu_seqlens, N, L, p.output_final_state, p.partition.numbers)
    found = found[0 if state is None else N * p.chunk_size :].view(p.level_scales.shape)
    if not p.output_final_state:
        return found, None
    no_decay = in_one_row(p.log_decay, state)
    return found, final_state(p, blocks, [k, k, no_decay, None], places_in_one_row(p, N))


def _reference(problem: Problem, L: int) -> tuple[Tensor, FenwickState | None]:
    """Return the same by the recurrence, with one head for each column. Each head reads its column alone."""
    state = problem.initial_state

    def for_columns(x: Tensor) -> Tensor:
        return x.repeat_interleave(L, 2)

    if state is not None:
        state = _with_heads(state, for_columns)
    one_column = torch.eye(L, dtype=problem.v.dtype, device=problem.v.device).repeat(problem.v.shape[2], 1)
    scales = one_column.expand(*problem.v.shape[:2], *one_column.shape)
    call = replace(problem, v=for_columns(problem.v), level_scales=scales, initial_state=state)
    output, final = impl_reference.run(call)
    found = (output.unflatten(2, (-1, L)) * problem.q[:, :, :, None]).sum(-1)
    return found, None if final is None else _with_heads(final, lambda x: x[:, :, ::L])


def _with_heads(state: FenwickState, heads: Callable[[Tensor], Tensor]) -> FenwickState:
    """Return a state with other heads, the third axis of its values."""
    blocks, v, log_decay = map(heads, (state.blocks, state.v, state.log_decay))
    # A graph of torch 2.11 loses the last fields of a state that `_replace` made.
    return FenwickState(state.position, blocks, state.k, v, log_decay, state.beta, state.partition, state.first)


def _tokens(problem: Problem, L: int) -> Tensor:
    """Return the tokens of the buckets that every token sees, [B or 1, T, L]."""
    state, ends = problem.initial_state, problem.cu_seqlens

    def make() -> Tensor:
        position, first = _positions(problem)
        return bucket_tokens(position, num_columns=L, partition=problem.partition, first=first)

    if state is None and ends is None:
        return make()
    name = ("tokens", *problem.v.shape[:2], L, problem.partition)
    return once(make, name, *((ends,) if state is None else (state.position, state.first, ends)))


def _positions(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Return the position of every token, and of its sequence's first one (None: 0), [B or 1, T] or [B, 1]."""
    T, ends, state = problem.v.shape[1], problem.cu_seqlens, problem.initial_state
    token = torch.arange(T, device=problem.v.device)
    if ends is None:
        if state is None:
            return token[None], None
        return state.position[:, None] + token, None if state.first is None else state.first[:, None]
    ends = ends.to(token.device, torch.int64)
    start, sequence = ends[:-1] if state is None else ends[:-1] - state.position, sequence_of(token, ends)
    first = None if state is None or state.first is None else state.first[sequence][None]
    return (token - start[sequence])[None], first


def without_own(x: Tensor) -> Tensor:
    """Return x [..., L] with 0 in column 0."""
    return torch.cat([torch.zeros_like(x[..., :1]), x[..., 1:]], -1)

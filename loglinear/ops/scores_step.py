"""The scores of buckets for one token of every row, from sums that change in place."""

# N rows, C chunk, M blocks, G query/key groups, K key, L columns
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loglinear.kernels import torch as kernels
from loglinear.ops import impl_triton
from loglinear.ops.announcement import announce
from loglinear.ops.problem import is_transformed, unit_length
from loglinear.ops.scores import SCORES, bucket_scores, bucket_tokens, without_own
from loglinear.ops.state import DecodeState, FenwickState
from loglinear.ops.validation import (
    BOOL,
    WIDE_FLOATS,
    check_blocks,
    check_family,
    check_state_dtype,
    check_tensor,
    one_of,
    whole_number,
)
from loglinear.partition import FENWICK, Partition


def bucket_scores_step(
    q: Tensor,
    k: Tensor,
    state: DecodeState,
    *,
    num_columns: int,
    active: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the scores and tokens of the buckets for the next token of every row, and advance `state` in place.

    A step has no derivatives and refuses inputs that require gradients.

    Args:
        q: [N, G, K], the queries.
        k: [N, G, K], the keys.
        state: The sums of N rows: `DecodeState.of` the final_state of `bucket_scores`. It changes in place.
        num_columns: L.
        active: [N] bool. An inactive row keeps its state, and its scores have no meaning. None: all rows are active.
        impl: "auto", "triton" (one launch, for a GPU), "torch" or "reference" (the recurrence). "auto" chooses triton
            on a GPU if it supports the step, and torch otherwise. triton supports every partition.

    Returns:
        The scores [N, G, L] and the tokens [N, L].

    Raises:
        ValueError: A shape or dtype does not fit, an input requires gradients, or impl does not support the step. The
            message names the argument.
    """
    one_of("impl of bucket_scores_step", impl, SCORES)
    step = _Step.checked(q, k, state, num_columns, active)
    reason = _unsupported(step)
    if impl == "triton" and reason is not None:
        raise ValueError(reason)
    on_gpu = q.device.type == "cuda"
    chosen = ("triton" if reason is None and on_gpu else "torch") if impl == "auto" else impl
    announce("bucket_scores_step", chosen, reason if impl == "auto" and on_gpu else None)
    run = {"triton": _triton, "torch": _torch, "reference": _reference}[chosen]
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return run(step)


@dataclass(frozen=True)
class _Step:
    """The checked arguments of one step."""

    q: Tensor
    k: Tensor
    sums: FenwickState
    num_columns: int
    active: Tensor | None

    @classmethod
    def checked(cls, q: Tensor, k: Tensor, state: DecodeState, num_columns: int, active: Tensor | None) -> _Step:
        """Return the checked step. Raises ValueError unless queries, keys and columns fit the sums."""
        if not isinstance(state, DecodeState):
            raise ValueError(f"state must be a DecodeState (DecodeState.of(final_state)), got {type(state).__name__}")
        sums, sizes = state.fenwick, state.sizes()
        check_family("state", sums.beta is not None, False)
        for name, x in (("q", q), ("k", k)):
            check_tensor(name, x, "NGK", sizes, sums.k.device)
        partition = sums.partition or FENWICK
        if sizes["C"] != partition.finest_block:
            expected = f"{partition.finest_block}, the finest_block of its partition"
            raise ValueError(f"state must have chunk_size {expected}, got {sizes['C']}")
        check_tensor("state.blocks", sums.blocks, "NMGKK", sizes, sums.k.device, WIDE_FLOATS)
        L = whole_number("num_columns", num_columns)
        check_blocks(partition, L, sizes["C"], sizes["M"])
        if active is not None:
            check_tensor("active", active, "N", sizes, sums.k.device, BOOL)
        check_state_dtype("state", sums, [q, k])
        wanted = [name for name, x in (("q", q), ("k", k)) if x.requires_grad and torch.is_grad_enabled()]
        if is_transformed() or wanted:
            raise ValueError(
                f"a step has no derivatives, but {' and '.join(wanted) or 'torch.func or forward-mode AD'} would need "
                "one: use torch.no_grad(), or bucket_scores with initial_state"
            )
        return cls(q, k, sums, L, active)

    @property
    def partition(self) -> Partition:
        return self.sums.partition or FENWICK


def _unsupported(step: _Step) -> str | None:
    """Return the reason why the kernel does not support a step; None if it supports it."""
    reason = impl_triton.unavailable(step.q.device)
    if reason is not None:
        return reason
    if step.sums.blocks.dtype == torch.float64:
        return "float64 needs impl='torch'"
    from loglinear.kernels.triton import limits

    return limits.of_score_step(step.sums.blocks)


def _triton(step: _Step) -> tuple[Tensor, Tensor]:
    """Run the kernel."""
    from loglinear.kernels.triton.args import DecodeState as Arrays
    from loglinear.kernels.triton.bucket_scores import step as kernel

    s = step.sums
    arrays = Arrays(s.position, s.blocks, s.k, s.v, s.log_decay, None, None)
    assert s.first is not None
    return kernel(step.q, step.k, step.active, arrays, s.first, step.num_columns, step.partition)


def _torch(step: _Step) -> tuple[Tensor, Tensor]:
    """Read every sum and add the keys, in plain torch."""
    sums, L, active = step.sums, step.num_columns, step.active
    tokens = bucket_tokens(sums.position, num_columns=L, partition=step.partition, first=sums.first)
    q, k = (unit_length(x.to(sums.blocks.dtype)) for x in (step.q, step.k))
    read = (q[:, None, :, None, :] @ sums.blocks)[:, :, :, 0]  # [N, M, G, K]
    found = (read * q[:, None]).sum(-1).mT[..., 1 - L :]  # block m has column L - M + m
    older = tokens[:, None, 1 - L :]
    # An absent block holds arbitrary numbers.
    found = torch.where(older > 0, found - older.to(found.dtype) / q.shape[2], 0.0)
    full = sums.position % sums.chunk_size == sums.chunk_size - 1
    if active is not None:
        k, full = torch.where(active[:, None, None], k, 0.0), full & active
    kernels.add_keys(sums.k, sums.v, k, sums.blocks, sums.position, full, step.partition)
    sums.position.add_(1 if active is None else active)
    return without_own(torch.cat([found[..., :1], found], -1)[..., -L:]), tokens


def _reference(step: _Step) -> tuple[Tensor, Tensor]:
    """Run the recurrence for one token, and copy its final state into the sums."""
    options = dict(num_columns=step.num_columns, partition=step.partition, impl="reference")
    q, k = step.q[:, None], step.k[:, None]
    result = bucket_scores(q, k, initial_state=step.sums, output_final_state=True, **options)  # type: ignore[arg-type]
    assert result.final_state is not None
    for mine, new in zip(step.sums.tensors, result.final_state.tensors, strict=True):
        if step.active is not None:
            new = torch.where(step.active.view(-1, *[1] * (new.dim() - 1)), new, mine)
        mine.copy_(new)
    return result.scores[:, 0], result.tokens[:, 0]

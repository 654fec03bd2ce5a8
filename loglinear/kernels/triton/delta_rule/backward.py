"""The backward: the tree is built again, then each stage is the adjoint of a forward's stage, in the opposite order."""

# B batch, T time, H heads, G groups, K key, V value, L levels, C chunk, N sequences, M blocks
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loglinear.kernels.triton.args import Rows, Slab
from loglinear.kernels.triton.delta_rule.carry_in_backward import carry_in_backward
from loglinear.kernels.triton.delta_rule.decay_backward import decay_backward
from loglinear.kernels.triton.delta_rule.final_blocks import final_blocks_backward
from loglinear.kernels.triton.delta_rule.forward import (
    build_tree,
    count_slots,
    head_slabs,
    inputs_of,
    limit_of,
    row_numbers,
    with_decays,
)
from loglinear.kernels.triton.delta_rule.in_chunk import in_chunk
from loglinear.kernels.triton.delta_rule.keys_backward import keys_backward
from loglinear.kernels.triton.delta_rule.lower_backward import lower_backward
from loglinear.kernels.triton.delta_rule.run_scan_backward import run_scan_backward
from loglinear.kernels.triton.delta_rule.scores_backward import scores_backward
from loglinear.kernels.triton.delta_rule.state_backward import past_backward
from loglinear.kernels.triton.delta_rule.states import (
    EntryGradients,
    Inputs,
    Inside,
    Past,
    PastGradients,
    Saved,
    TierStates,
)
from loglinear.kernels.triton.delta_rule.walk_backward import walk_backward
from loglinear.kernels.triton.delta_rule.writes_backward import writes_backward
from loglinear.kernels.triton.diagonal_gate.decayed_rows_backward import Rowwise, decayed_rows_backward
from loglinear.kernels.triton.diagonal_gate.states import DecayedGradients
from loglinear.kernels.triton.inputs import Operands, Outgoing, Sequences, in_rows, like
from loglinear.kernels.triton.launches import Plan
from loglinear.partition import Partition

SLAB_BYTES = 2 << 30  # of the arrays of chunks that a backward holds at once, at least; for long inputs 1.5 times them


class Slabs(NamedTuple):
    """The gradients that the stages write where they belong: some heads of dq, dk, each head by itself, of dv,
    dlog_decay, dbeta and dlevel_scales."""

    dq: Slab
    dk: Slab
    dv: Slab
    dlog_decay: Slab
    dbeta: Slab
    dlevel_scales: Slab


def reads_backward(
    x: Inputs, saved: Saved, past: Past, outgoing: Outgoing, dlevel_scales: Slab
) -> tuple[Inside, Tensor, PastGradients]:
    """The adjoint of the chunks' reads of their `past`. Return the inside of the chunks, which it computes again, dX,
    and the gradients of the past. X, X' and dX' are freed."""
    do = Rows.of(outgoing.do)
    inside, q_in = in_chunk(x, saved)
    queries = walk_backward(x, q_in, past, do, dlevel_scales)
    dpast = past_backward(x, q_in, queries, past, do)
    if outgoing.dblocks is not None:
        final_blocks_backward(x, past, outgoing.dblocks, dpast)
    return inside, queries.dq_in, dpast


def tree_backward(
    x: Inputs, tree: list[TierStates], dpast: PastGradients, starts: Tensor | None
) -> tuple[EntryGradients, Tensor | None]:
    """The gradients of the chunks' own states and transitions, and of the initial blocks, from those of the past."""
    tiers = [(dpast.kept, dpast)]  # the gradients of a tier's reads, and of its past
    for states in tree[1:]:
        dreads = dpast.carried
        dpast = carry_in_backward(x, states.tier, states.past, dreads)
        tiers.append((dreads, dpast))
    dinitial = None
    if x.initial is not None and starts is not None:
        dinitial = torch.zeros_like(x.initial, dtype=torch.float32)
        has_prefix = x.tree.has_prefix(starts, x.sizes.cap)
        dinitial[:, -1] = torch.where(has_prefix[:, None, None, None], dpast.carried[:, 0], 0.0)
    dentries = None
    for states, (dreads, dpast) in zip(reversed(tree), reversed(tiers), strict=True):
        dentries = run_scan_backward(x, states, dreads, dpast, dentries, dinitial)
    assert dentries is not None
    return dentries, dinitial


def between_backward(
    x: Inputs, saved: Saved, outgoing: Outgoing, sequences: Sequences, dlevel_scales: Slab
) -> tuple[Inside, Tensor, EntryGradients, Tensor | None]:
    """The adjoint of everything between chunks. Return the inside of the chunks, which it computes again, dX, and the
    gradients of the chunks as entries and of the initial blocks. The tree is freed."""
    tree = build_tree(x, saved)
    inside, dq_in, dpast = reads_backward(x, saved, tree[0].past, outgoing, dlevel_scales)
    dentries, dinitial = tree_backward(x, tree, dpast, sequences.starts)
    return inside, dq_in, dentries, dinitial


def backward(x: Inputs, outgoing: Outgoing, sequences: Sequences, slabs: Slabs) -> Tensor | None:
    """Write the gradients of these heads into `slabs`; return dinitial."""
    assert outgoing.inverse is not None and outgoing.cumulative is not None
    assert len(outgoing.inverse) == x.layout.chunks
    saved, do = Saved.of(outgoing.inverse, outgoing.cumulative.contiguous()), Rows.of(outgoing.do)
    if x.is_diagonal:
        return diagonal_backward(x, saved, outgoing, sequences, slabs)
    inside, dq_in, dentries, dinitial = between_backward(x, saved, outgoing, sequences, slabs.dlevel_scales)
    dinside = scores_backward(x, saved, inside, do, dq_in, slabs.dq, slabs.dlevel_scales)
    writes = writes_backward(x, saved, inside, dinside, dentries, do, slabs.dk, slabs.dv)
    lower = lower_backward(x, saved, inside, dinside, writes, slabs.dbeta)
    keys_backward(x, saved.cumulative, dinside, writes.dkeys, lower, slabs.dk)
    decay_backward(x, saved.cumulative, dentries.transitions, dinside, lower, slabs.dlog_decay)
    return dinitial


def diagonal_backward(x: Inputs, saved: Saved, outgoing: Outgoing, sequences: Sequences, slabs: Slabs) -> Tensor | None:
    """`backward` with a diagonal gate: the stages after the first know of no decay inside the chunks."""
    y, do = with_decays(x), Rows.of(outgoing.do)
    saved = Saved.of(saved.inverse, saved.cumulative, y.decayed)
    inside, dq_in, dentries, dinitial = between_backward(y, saved, outgoing, sequences, slabs.dlevel_scales)
    dinside = scores_backward(y, saved, inside, do, dq_in, None, slabs.dlevel_scales)
    seen = Slab.of(x.empty(*y.k.data.shape))
    writes = writes_backward(y, saved, inside, dinside, dentries, do, seen, slabs.dv)
    lower = lower_backward(y, saved, inside, dinside, writes, slabs.dbeta)
    gradients = DecayedGradients(
        dinside.dq_in,
        writes.dkeys,
        dinside.dscores,
        transitions=dentries.transitions,
        seen=seen,
        products=lower.dlower,
    )
    to = Rowwise(slabs.dq, slabs.dk, slabs.dlog_decay)
    decayed_rows_backward(x, gradients, to, x.scale, x.math, x.plan["decayed_rows_backward"])
    return dinitial


def slab_ranges(x: Operands, outgoing: Outgoing, chunks: int, C: int, partition: Partition) -> list[slice]:
    """Ranges of heads, so that the arrays of chunks that a backward holds stay small."""
    K, V = x.q.shape[3], x.v.shape[3]
    numbers = 4 * K * K + 2 * (count_slots(x, C, partition) + 1) * K * V + 5 * C * K + 4 * C * C
    numbers += 2 * row_numbers(x, C)
    return head_slabs(x, chunks, C, numbers, limit_of(SLAB_BYTES, x.q, x.k, x.v, outgoing.do))


def gradients(x: Operands, sequences: Sequences, outgoing: Outgoing, scale: float, plan: Plan) -> Operands:
    """The gradient of every operand: slab after slab of heads."""
    assert x.beta is not None and outgoing.inverse is not None
    K, R, chunks = x.q.shape[3], x.v.shape[2] // x.q.shape[2], len(outgoing.inverse)
    outgoing = outgoing._replace(do=in_rows(outgoing.do))

    # Columns that no walk reads stay 0.
    dv, dlog_decay, dbeta, dlevel_scales = like(x.v), like(x.log_decay), like(x.beta), like(x.level_scales).zero_()
    dinitial = None if x.initial is None else like(x.initial, torch.float32)
    ranges = slab_ranges(x, outgoing, chunks, plan.chunk_size, sequences.partition)
    if R == 1:
        dq, dk = like(x.q), like(x.k)
    elif len(ranges) > 1:
        dq, dk = (like(y, torch.float32).zero_() for y in (x.q, x.k))
    for h in ranges:
        g = slice(h.start // R, (h.stop - 1) // R + 1)
        call = inputs_of(x.heads(h), sequences, scale, plan)
        if R == 1:
            dq_h, dk_h = dq[:, :, g], dk[:, :, g]
        else:
            dq_h, dk_h = (call.empty(*x.q.shape[:2], call.heads, K) for _ in range(2))
        views = (y[:, :, h] for y in (dv, dlog_decay, dbeta, dlevel_scales))
        dinitial_h = backward(call, outgoing.heads(h), sequences, Slabs(*map(Slab.of, (dq_h, dk_h, *views))))
        if R > 1:
            dq_g, dk_g = (y.unflatten(2, (g.stop - g.start, -1)).sum(3) for y in (dq_h, dk_h))
            if len(ranges) == 1:
                dq, dk = dq_g, dk_g
            else:
                dq[:, :, g].add_(dq_g)
                dk[:, :, g].add_(dk_g)
        if dinitial is not None and dinitial_h is not None:
            dinitial[:, :, h] = dinitial_h
    return Operands(dq.to(x.q.dtype), dk.to(x.k.dtype), dv, dlog_decay, dbeta, dlevel_scales, dinitial)

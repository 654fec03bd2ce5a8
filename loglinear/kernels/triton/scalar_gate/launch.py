"""The stages in order: what `run_scalar_gate` computes, and its gradients.

Forward: chunk states, up-sweeps, output. It keeps nothing but its inputs: the backward builds the states again, which
is cheaper than holding T / C of them (docs/lab-notes/2026-11-23-scalar-gate-kernels.md).
"""

# B batch, T time, H heads, G groups, K key, V value, L levels
from __future__ import annotations

from functools import cached_property

import torch
import triton
from torch import Tensor

from loglinear.fenwick import log2
from loglinear.kernels.triton.call import DOT_TYPES, Call, common_dtype, in_rows, like, slabs
from loglinear.kernels.triton.config import Plan
from loglinear.kernels.triton.layout import READS, layout
from loglinear.kernels.triton.scalar_gate.chunk_state import chunk_state_kernel
from loglinear.kernels.triton.scalar_gate.chunk_state_backward import chunk_state_backward_kernel
from loglinear.kernels.triton.scalar_gate.decay_backward import decay_backward_kernel
from loglinear.kernels.triton.scalar_gate.final_blocks import final_blocks_backward_kernel, final_blocks_kernel
from loglinear.kernels.triton.scalar_gate.in_chunk_backward import in_chunk_backward_kernel
from loglinear.kernels.triton.scalar_gate.output import output_kernel
from loglinear.kernels.triton.scalar_gate.state_backward import (
    node_backward_kernel,
    state_backward_kernel,
    sum_runs_kernel,
)
from loglinear.kernels.triton.scalar_gate.sweep import down_sweep_kernel, up_sweep_kernel
from loglinear.kernels.triton.scalar_gate.walk_backward import walk_backward_kernel

SWEEP_STEPS = 8  # tiles of the states that one program of a sweep takes
PROGRAMS = 528  # four for each of the 132 multiprocessors of an H100: heads are split until a launch has as many
SLAB_BYTES = 1 << 30  # of the states that a backward builds at once; their gradients take as much again
ROWS = 64  # tokens of a chunk that one program takes at most, where it holds all pairs of them
ELEMENTS = 1024  # numbers of a state that one program of the elementwise stages takes


class ScalarGate(Call):
    """One call, with the arrays between the stages."""

    def __init__(
        self,
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, level_scales: Tensor, nodes: Tensor | None,
        cu_seqlens: Tensor | None, starts: Tensor | None, scale: float, plan: Plan,
    ) -> None:  # fmt: skip
        super().__init__(
            q, k, v, log_decay, level_scales, nodes, scale, plan.chunk_size, common_dtype(q, k, v)
        )  # fmt: skip
        self.layout = layout(self.B, self.T, self.C, self.L, cu_seqlens, starts)
        self.packed, self.sizes = dict(PACKED=self.layout.packed), (self.T, self.layout.chunks_per_row, self.H)
        self.plan, self.size = plan, self.K * self.V
        self.shape = dict(K=self.K, V=self.V, C=self.C, BK=max(16, triton.next_power_of_2(self.K)))
        self.log_c = log2(self.C)
        # Stages that work on tokens take a long chunk in halves: two C / 2 tiles on the diagonal and one below it.
        self.halves = 2 if self.C > ROWS else 1

    def options(self, stage: str) -> dict[str, int]:
        launch = self.plan.stages[stage]
        return dict(num_warps=launch.num_warps, num_stages=launch.num_stages)

    def value_tile(self, stage: str) -> int:
        return min(self.plan.stages[stage].tile, max(16, triton.next_power_of_2(self.V)))

    def value_tiles(self, stage: str) -> int:
        return triton.cdiv(self.V, self.value_tile(stage))

    def sweep_parts(self, stage: str) -> int:
        return triton.cdiv(self.size, self.plan.stages[stage].tile * SWEEP_STEPS)

    @cached_property
    def splits(self) -> int:
        """Into how many programs a group's heads go, so that short sequences fill the device."""
        programs = self.layout.chunks * self.halves * self.G
        return next((s for s in range(1, self.R) if self.R % s == 0 and programs * s >= PROGRAMS), self.R)

    def build_states(self) -> None:
        """Chunk states, then the Fenwick array."""
        y, H = self.layout, self.H
        self.slots = self.empty(y.chunks, H, self.K, self.V, dtype=self.dtype)
        self.totals = self.empty(len(y.runs) + 1, y.chunks, H)
        self.cumulative = self.empty(y.chunks, H, self.C)
        self.log_p = self.empty(y.chunks, H)
        chunk_state_kernel[(y.chunks * H * self.value_tiles("chunk_state"),)](
            self.k, self.v, self.log_decay, self.slots, self.totals, self.cumulative, y.table,
            *self.sizes, self.R, *self.k.stride()[:3], *self.v.stride()[:3], *self.log_decay.stride(),
            BV=self.value_tile("chunk_state"),
            **self.shape, **self.dots, **self.packed, **self.options("chunk_state"),
        )  # fmt: skip
        for storey, runs in enumerate(y.runs):
            up_sweep_kernel[(runs * H * self.sweep_parts("up_sweep"),)](
                self.slots, self.nodes, self.totals[storey], self.totals[storey + 1], self.log_p,
                y.run_tables[storey], y.chunks_per_row, H, y.cap, storey,
                SIZE=self.size, E=self.plan.stages["up_sweep"].tile, STEPS=SWEEP_STEPS, NODES=self.has_nodes,
                **self.dots, **self.packed, **self.options("up_sweep"),
            )  # fmt: skip

    def output(self) -> Tensor:
        y = self.layout
        out = self.empty(self.B, self.T, self.H, self.V, dtype=self.v.dtype)
        output_kernel[(y.chunks * self.halves * self.H * self.value_tiles("output"),)](
            self.q, self.k, self.v, self.level_scales, self.cumulative, self.slots, self.nodes, self.log_p, out,
            y.table, *self.sizes, self.R, self.L, y.cap, self.scale,
            *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3], *self.level_scales.stride()[:3],
            LOG_C=self.log_c, HALVES=self.halves, LINEAR=self.L == 1, BV=self.value_tile("output"),
            NODES=self.has_nodes,
            **self.shape, **self.dots, **self.packed, **self.options("output"),
        )  # fmt: skip
        return out

    def final_blocks(self) -> Tensor:
        """[N, M, H, K, V]: what each sequence leaves at the start of its unfinished chunk."""
        y = self.layout
        blocks = self.empty(y.sequences, y.cap + 1, self.H, self.K, self.V)
        final_blocks_kernel[(y.sequences * (y.cap + 1) * self.H * triton.cdiv(self.size, ELEMENTS),)](
            self.slots, self.nodes, self.log_p, blocks, y.ends, *self.sizes, y.cap,
            SIZE=self.size, E=ELEMENTS, C=self.C, NODES=self.has_nodes, **self.packed,
        )  # fmt: skip
        return blocks

    def backward(
        self, do: Tensor, dblocks: Tensor | None, dv: Tensor, dlog_decay: Tensor, dlevel_scales: Tensor, partial: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Writes the gradients of these heads into views of the whole ones; returns dq, dk and dnodes. `partial`: these
        are not all heads of their group, so that dq and dk are to be added up, in float32."""
        y, H, halves = self.layout, self.H, self.halves
        # One program sums all heads of a group, or dq and dk have a plane for each share of them.
        are_whole = not partial and self.splits == 1
        dq, dk = (
            self.empty(self.splits, *x.shape, dtype=x.dtype if are_whole else torch.float32) for x in (self.q, self.k)
        )
        rows, pairs = self.C // halves, halves * (halves + 1) // 2
        dscores = self.empty(self.splits, y.chunks, self.G, pairs, rows, rows, dtype=self.dtype)
        walk_flow, row_flow, column_flow, state_flow = (self.empty(y.chunks, H, self.C) for _ in range(4))
        cross_scales = self.empty(y.chunks if halves > 1 else 0, H, rows)
        read_paths, beyond = self.empty(y.chunks, H, READS), self.empty(y.chunks, halves, H, READS)
        q_, k_, v_, l_, o_ = (x.stride()[:3] for x in (self.q, self.k, self.v, self.level_scales, do))
        programs, planes = y.chunks * halves * self.G * self.splits, (dq.stride(0), dscores.stride(0))

        self.build_states()
        for cross in range(halves):
            in_chunk_backward_kernel[(programs // (1 + cross),)](
                self.q, self.k, self.v, self.level_scales, self.cumulative, do,
                dv, dlevel_scales, row_flow, column_flow, cross_scales, dscores, y.table,
                *self.sizes, self.R, self.L, self.scale, dscores.stride(0), *q_, *k_, *v_, *l_, *o_,
                dv.stride(1), dlevel_scales.stride(1),
                J=rows, LOG_J=log2(rows), CROSS=cross == 1,
                BV=self.value_tile("in_chunk_backward"), SPLIT=self.splits, LINEAR=self.L == 1,
                **self.shape, **self.dots, **self.packed, **self.options("in_chunk_backward"),
            )  # fmt: skip
        walk_backward_kernel[(programs,)](
            self.q, self.k, self.level_scales, self.cumulative, self.slots, self.nodes, self.log_p, do,
            dscores, cross_scales, dq, dlevel_scales, walk_flow, read_paths, beyond, y.table,
            *self.sizes, self.R, self.L, y.cap, self.scale, *planes, *q_, *k_, *l_, *o_, dlevel_scales.stride(1),
            LOG_C=self.log_c, HALVES=halves, BV=self.value_tile("walk_backward"), SPLIT=self.splits,
            NODES=self.has_nodes,
            **self.shape, **self.dots, **self.packed, **self.options("walk_backward"),
        )  # fmt: skip
        dslots, dnodes, dtotals = self.state_gradients(do, dblocks, read_paths, beyond, (*q_, *l_, *o_))
        chunk_state_backward_kernel[(programs,)](
            self.q, self.k, self.v, self.cumulative, self.totals, dslots, dscores, dk, dv, state_flow, y.table,
            *self.sizes, self.R, *planes, *q_, *k_, *v_, dv.stride(1),
            HALVES=halves, BV=self.value_tile("chunk_state_backward"), SPLIT=self.splits,
            **self.shape, **self.dots, **self.packed, **self.options("chunk_state_backward"),
        )  # fmt: skip
        parts = self.sweep_parts("down_sweep")
        decay_backward_kernel[(y.chunks * H,)](
            self.log_decay, walk_flow, row_flow, column_flow, state_flow, dtotals, dlog_decay, y.table,
            *self.sizes, *self.log_decay.stride(), dlog_decay.stride(1), dtotals.stride(0), dtotals.stride(1),
            C=self.C, STOREYS=len(y.runs), PARTS=parts, PARTS_2=triton.next_power_of_2(parts),
            **self.packed, num_warps=1,
        )  # fmt: skip
        dq, dk = (x[0] if self.splits == 1 else x.sum(0) for x in (dq, dk))
        return dq, dk, dnodes

    def state_gradients(
        self, do: Tensor, dblocks: Tensor | None, read_paths: Tensor, beyond: Tensor, strides: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gradients of every chunk's own state, of the nodes, and of the entries' totals [storey, part, chunk, H]."""
        y, H = self.layout, self.H
        dslots = torch.empty_like(self.slots)
        dnodes = None if self.nodes is None else torch.zeros_like(self.nodes, dtype=torch.float32)
        dlog_p = self.empty(y.chunks, H)
        tiles, levels = self.value_tiles("state_backward"), max(1, y.run_levels)
        gathered = (self.q, self.level_scales, self.cumulative, read_paths, beyond, do)
        sizes = (*self.sizes, self.R, self.L, y.cap, self.scale, *strides)
        constants = dict(
            LOG_C=self.log_c, HALVES=self.halves, BV=self.value_tile("state_backward"),
            **self.shape, **self.dots, **self.packed, **self.options("state_backward"),
        )  # fmt: skip
        state_backward_kernel[(y.chunks * H * tiles,)](
            *gathered, dslots, dlog_p, y.table, None, *sizes, RUNS=False, LEVELS=1, **constants
        )
        partial = None
        if y.chunks_per_row >= 64 or self.has_nodes:
            partial = self.empty(y.runs[0] * levels, H, self.K, self.V)
            dpartial_log = self.empty(y.runs[0] * levels, H)
            state_backward_kernel[(y.runs[0] * levels * H * tiles,)](
                *gathered, partial, dpartial_log, y.table, y.run_tables[0], *sizes,
                RUNS=True, LEVELS=levels, **constants,
            )  # fmt: skip
            sum_runs_kernel[(y.runs[0] * H * triton.cdiv(self.size, ELEMENTS),)](
                partial, dpartial_log, dslots, dlog_p, y.run_tables[0], y.chunks_per_row, H, y.cap,
                SIZE=self.size, E=ELEMENTS, LEVELS=levels, **self.packed,
            )  # fmt: skip
        if dnodes is not None:
            node_backward_kernel[(y.sequences * (y.cap + 1) * H * tiles,)](
                *gathered, partial, dnodes, y.table, y.ends, y.run_tables[0], y.first_runs, *sizes,
                LEVELS=levels, **constants,
            )  # fmt: skip
        if dblocks is not None:
            final_blocks_backward_kernel[(y.sequences * H,)](
                self.slots, self.nodes, self.log_p, dblocks.contiguous(), dslots, dnodes, dlog_p, y.ends,
                *self.sizes, y.cap, SIZE=self.size, E=ELEMENTS, C=self.C, NODES=self.has_nodes, **self.packed,
            )  # fmt: skip
        parts = self.sweep_parts("down_sweep")
        dtotals = self.empty(len(y.runs), parts, y.chunks, H)
        for storey in reversed(range(len(y.runs))):
            down_sweep_kernel[(y.runs[storey] * H * parts,)](
                self.slots, dslots, self.nodes, dnodes, self.totals[storey], dlog_p, dtotals[storey],
                y.run_tables[storey], y.chunks_per_row, H, y.cap, storey, int(storey == len(y.runs) - 1),
                dtotals.stride(1),
                SIZE=self.size, E=self.plan.stages["down_sweep"].tile, STEPS=SWEEP_STEPS, NODES=self.has_nodes,
                **self.dots, **self.packed, **self.options("down_sweep"),
            )  # fmt: skip
        return dslots, dnodes, dtotals


def gradients(
    do: Tensor, dblocks: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, level_scales: Tensor, nodes: Tensor | None,
    cu_seqlens: Tensor | None, starts: Tensor | None, scale: float, plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dq, dk, dv, dlog_decay, dlevel_scales, dnodes: slab after slab, so that states and their gradients stay small."""
    H, R, C = v.shape[2], v.shape[2] // q.shape[2], plan.chunk_size
    chunks = len(q) * triton.cdiv(q.shape[1], C) + (0 if cu_seqlens is None else len(cu_seqlens))
    state_bytes = q.shape[3] * v.shape[3] * DOT_TYPES[common_dtype(q, k, v)][0].itemsize
    do = in_rows(do)

    dv, dlog_decay = like(v), like(log_decay)
    # Columns that no walk could read stay 0.
    unread = level_scales.shape[3] > log2(C) + 1 + READS
    dlevel_scales = like(level_scales).zero_() if unread else like(level_scales)
    dnodes = None if nodes is None else like(nodes, torch.float32)
    parts = slabs(chunks, q.shape[2], H, state_bytes, SLAB_BYTES)
    partial = parts[0].stop - parts[0].start < R
    if len(parts) > 1:
        dq, dk = (like(x, torch.float32 if partial else None) for x in (q, k))
    for h in parts:
        g = slice(h.start // R, (h.stop - 1) // R + 1)
        call = ScalarGate(
            q[:, :, g], k[:, :, g], v[:, :, h], log_decay[:, :, h], level_scales[:, :, h],
            None if nodes is None else nodes[:, :, h], cu_seqlens, starts, scale, plan,
        )  # fmt: skip
        dblocks_h = None if dblocks is None else dblocks[:, :, h]
        views = (dv[:, :, h], dlog_decay[:, :, h], dlevel_scales[:, :, h])
        dq_h, dk_h, dnodes_h = call.backward(do[:, :, h], dblocks_h, *views, partial)
        if len(parts) == 1:
            dq, dk = dq_h, dk_h
        elif h.start % R == 0:
            dq[:, :, g], dk[:, :, g] = dq_h, dk_h
        else:
            dq[:, :, g] += dq_h
            dk[:, :, g] += dk_h
        if dnodes is not None and dnodes_h is not None:
            dnodes[:, :, h] = dnodes_h
    return dq.to(q.dtype), dk.to(k.dtype), dv, dlog_decay, dlevel_scales, dnodes

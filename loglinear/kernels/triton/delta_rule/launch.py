"""The stages in order: what `run_delta_rule` computes, and its gradients.

Forward: triangular inverses, transitions, states, what is carried to the runs, output. It keeps nothing but its inputs.
"""

# B batch, T time, H heads, G groups, K key, V value, L levels
from __future__ import annotations

from functools import cached_property

import torch
import triton
from torch import Tensor

from loglinear.fenwick import log2
from loglinear.kernels.triton.delta_rule.carry import carry_states_kernel, carry_transitions_kernel
from loglinear.kernels.triton.delta_rule.chunk_inverse import chunk_inverse_kernel
from loglinear.kernels.triton.delta_rule.layout import STOREY
from loglinear.kernels.triton.delta_rule.output import output_kernel
from loglinear.kernels.triton.delta_rule.up_sweep import state_sweep_kernel, transition_sweep_kernel
from loglinear.kernels.triton.layout import READS, layout
from loglinear.kernels.triton.scalar_gate.launch import DOT_TYPES, common_dtype, in_rows

ROWS = 64  # tokens of a chunk that one program takes at most, where it holds all pairs of them
# Warps and stages of the pipeline. Sweeps read what they wrote: nothing may be loaded ahead there.
LAUNCHES = {
    "chunk_inverse": (4, 1), "transition_sweep": (8, 1), "state_sweep": (8, 1), "carry_transitions": (8, 1),
    "carry_states": (8, 1), "output": (4, 1),
}  # fmt: skip


class DeltaRule:
    """One call: its inputs, sizes and the arrays between the stages."""

    def __init__(
        self,
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, level_scales: Tensor, nodes: Tensor | None,
        cu_seqlens: Tensor | None, starts: Tensor | None, scale: float, chunk_size: int,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.level_scales = in_rows(q), in_rows(k), in_rows(v), in_rows(level_scales)
        self.log_decay, self.beta = log_decay, beta
        self.B, self.T, self.G, self.K = q.shape
        self.H, self.V = v.shape[2:]
        self.L, self.R, self.scale, self.C = level_scales.shape[3], self.H // self.G, scale, chunk_size
        self.halves = 2 if self.C > ROWS else 1
        self.rows = self.C // self.halves
        self.layout = layout(self.B, self.T, self.C, self.L, cu_seqlens, starts, STOREY)
        self.dtype, dot, precision = DOT_TYPES[common_dtype(q, k, v)]
        self.nodes = None if nodes is None else nodes.to(self.dtype).contiguous()
        self.dots, self.precision = dict(DOT=dot, PRECISION=precision), dict(PRECISION=precision)
        self.packed = dict(PACKED=self.layout.packed)
        self.key_tile = min(128 if self.dtype == torch.bfloat16 and self.K <= 128 else 64, at_least_16(self.K))
        self.value_tile = min(128 if self.dtype == torch.bfloat16 and self.K <= 128 else 64, at_least_16(self.V))
        self.value_tiles = triton.cdiv(self.V, self.value_tile)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.v.device)

    def options(self, stage: str) -> dict[str, int]:
        warps, stages = LAUNCHES[stage]
        return dict(num_warps=warps if self.key_tile > 64 else 4, num_stages=stages)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return self.T, self.layout.chunks_per_row, self.H

    @cached_property
    def carried_columns(self) -> int:
        """Columns of the states that each run gets from before it."""
        return min(self.layout.run_levels, max(0, self.layout.cap - STOREY) + 1)

    def strides(self, *names: str) -> tuple[int, ...]:
        return tuple(stride for name in names for stride in getattr(self, name).stride()[:3])

    def build_states(self) -> None:
        """Each chunk's inverse, the Fenwick array, and what is carried to the runs."""
        y, H, K, V, C = self.layout, self.H, self.K, self.V, self.rows
        self.inverse = self.empty(y.chunks, self.halves, H, C, C, dtype=self.dtype)
        self.cumulative = self.empty(y.chunks, self.halves, H, C)
        inverse_precision = "tf32x3" if self.v.dtype == torch.float32 else "tf32"
        chunk_inverse_kernel[(y.chunks * self.halves * H,)](
            self.k, self.beta, self.log_decay, self.inverse, self.cumulative, y.table, *self.sizes, self.R,
            *self.strides("k", "beta", "log_decay"),
            K=K, C=C, LOG_C=log2(C), HALVES=self.halves, TK=self.key_tile, INVERSE_PRECISION=inverse_precision,
            **self.dots, **self.packed, **self.options("chunk_inverse"),
        )  # fmt: skip
        self.transitions, self.rights = (self.empty(y.chunks, H, K, K, dtype=self.dtype) for _ in range(2))
        self.slots = self.empty(y.chunks, H, K, V, dtype=self.dtype)
        for storey, runs in enumerate(y.runs):
            transition_sweep_kernel[(runs * H,)](
                self.k, self.beta, self.inverse, self.cumulative, self.transitions, self.rights, y.table,
                y.run_tables[storey], *self.sizes, self.R, y.cap, storey, *self.strides("k", "beta"),
                K=K, C=C, HALVES=self.halves, TK=self.key_tile, OWN=storey == 0, **self.dots, **self.packed,
                **self.options("transition_sweep"),
            )  # fmt: skip
        for storey, runs in enumerate(y.runs):
            state_sweep_kernel[(runs * H * self.value_tiles,)](
                self.k, self.v, self.beta, self.inverse, self.cumulative, self.transitions, self.rights, self.slots,
                self.nodes, y.table, y.run_tables[storey], *self.sizes, self.R, y.cap, storey,
                *self.strides("k", "v", "beta"),
                K=K, V=V, C=C, HALVES=self.halves, TK=self.key_tile, BV=self.value_tile, OWN=storey == 0,
                NODES=self.nodes is not None,
                **self.dots, **self.packed, **self.options("state_sweep"),
            )  # fmt: skip
        self.carried = self.carry(y.runs[0], y.run_levels, self.carried_columns, self.dtype, ends=False)[0]

    def carry(self, carriers: int, candidates: int, columns: int, dtype: torch.dtype, ends: bool) -> tuple[Tensor, Tensor]:
        """States of the blocks on each carrier's walk [carrier, column, H, K, V], and the transitions on the way."""
        y, H, K, V = self.layout, self.H, self.K, self.V
        paths = self.empty(carriers, candidates, H, K, K, dtype=self.dtype)
        carried = self.empty(carriers, columns, H, K, V, dtype=dtype)
        if columns == 0:
            return carried, paths
        table = y.run_tables[0]
        carry_transitions_kernel[(carriers * H,)](
            self.transitions, paths, table, y.ends, *self.sizes, y.cap, candidates,
            K=K, C=self.C, TK=self.key_tile, ENDS=ends, **self.precision, **self.packed, **self.options("carry_transitions"),
        )  # fmt: skip
        carry_states_kernel[(carriers * columns * H * self.value_tiles,)](
            self.slots, self.nodes, paths, carried, table, y.ends, *self.sizes, y.cap, columns, candidates,
            K=K, V=V, C=self.C, TK=self.key_tile, BV=self.value_tile, ENDS=ends, NODES=self.nodes is not None,
            **self.precision, **self.packed, **self.options("carry_states"),
        )  # fmt: skip
        return carried, paths

    def output(self) -> Tensor:
        y = self.layout
        out = self.empty(self.B, self.T, self.H, self.V, dtype=self.v.dtype)
        output_kernel[(y.chunks * self.halves * self.H * self.value_tiles,)](
            self.q, self.k, self.v, self.beta, self.level_scales, self.inverse, self.cumulative, self.transitions,
            self.slots, self.nodes, self.carried, out, y.table, y.first_runs,
            *self.sizes, self.R, self.L, y.cap, self.scale, self.carried_columns,
            *self.strides("q", "k", "v", "beta", "level_scales"),
            K=self.K, V=self.V, C=self.rows, LOG_C=log2(self.C), HALVES=self.halves, TK=self.key_tile,
            BV=self.value_tile, LINEAR=self.L == 1, NODES=self.nodes is not None, **self.dots, **self.packed, **self.options("output"),
        )  # fmt: skip
        return out

    def final_blocks(self) -> Tensor:
        """[N, M, H, K, V]: what each sequence leaves at the start of its unfinished chunk."""
        return self.carry(self.layout.sequences, READS, self.layout.cap + 1, torch.float32, ends=True)[0]


def at_least_16(size: int) -> int:
    return max(16, triton.next_power_of_2(size))

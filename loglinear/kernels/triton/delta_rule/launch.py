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
from loglinear.kernels.triton.call import DOT_TYPES, Call, common_dtype, in_rows, like, slabs
from loglinear.kernels.triton.config import Launch
from loglinear.kernels.triton.delta_rule.carry import carry_states_kernel, carry_transitions_kernel
from loglinear.kernels.triton.delta_rule.carry_backward import (
    carried_nodes_backward_kernel,
    carry_backward_kernel,
    carry_paths_backward_kernel,
    ends_backward_kernel,
)
from loglinear.kernels.triton.delta_rule.chunk_inverse import chunk_inverse_kernel
from loglinear.kernels.triton.delta_rule.chunk_state import chunk_state_kernel
from loglinear.kernels.triton.delta_rule.down_sweep import state_down_sweep_kernel, transition_down_sweep_kernel
from loglinear.kernels.triton.delta_rule.in_chunk import in_chunk_kernel
from loglinear.kernels.triton.delta_rule.in_chunk_backward import (
    decay_backward_kernel,
    keys_backward_kernel,
    lower_backward_kernel,
    scores_backward_kernel,
    writes_backward_kernel,
)
from loglinear.kernels.triton.delta_rule.layout import STOREY
from loglinear.kernels.triton.delta_rule.output import output_kernel
from loglinear.kernels.triton.delta_rule.state_backward import (
    carried_backward_kernel,
    node_backward_kernel,
    state_backward_kernel,
)
from loglinear.kernels.triton.delta_rule.up_sweep import state_sweep_kernel, transition_sweep_kernel
from loglinear.kernels.triton.delta_rule.walk_backward import MET, walk_backward_kernel
from loglinear.kernels.triton.layout import READS

BUILD = (
    "chunk_inverse", "chunk_state", "transition_sweep", "state_sweep", "carry_transitions", "carry_states",
)  # fmt: skip
STAGES = {
    "forward": (*BUILD, "output"),
    "backward": (
        *BUILD, "in_chunk", "walk_backward", "state_backward", "carried_backward", "carry_paths_backward",
        "carry_backward", "state_down_sweep", "transition_down_sweep", "scores_backward", "writes_backward",
        "lower_backward", "keys_backward", "decay_backward",
    ),
}  # fmt: skip
SLAB_BYTES = 2 << 30  # of what a backward keeps of each chunk, at least; for long inputs 1.5 times their size
# Columns of a tile at most, warps for tiles of more than 64 rows, stages of the pipeline. Sweeps read what they wrote:
# nothing may be loaded ahead there.
LAUNCHES = {
    "chunk_inverse": Launch(128, 4, 1), "chunk_state": Launch(64, 4, 1),
    "transition_sweep": Launch(128, 8, 1), "state_sweep": Launch(128, 8, 1),
    "carry_transitions": Launch(128, 8, 1), "carry_states": Launch(128, 8, 1), "output": Launch(128, 8, 1),
    "in_chunk": Launch(64, 4, 1), "walk_backward": Launch(128, 8, 1), "state_backward": Launch(128, 8, 1),
    "carried_backward": Launch(128, 8, 1), "carry_paths_backward": Launch(128, 8, 1),
    "carry_backward": Launch(128, 8, 1), "state_down_sweep": Launch(128, 8, 1),
    "transition_down_sweep": Launch(128, 8, 1), "scores_backward": Launch(64, 4, 1),
    "writes_backward": Launch(64, 8, 1), "lower_backward": Launch(64, 4, 1), "keys_backward": Launch(64, 4, 1),
    "decay_backward": Launch(128, 4, 1),
}  # fmt: skip
# Columns of V at most, where that is less.
VALUE_TILES = dict.fromkeys(
    ("state_backward", "carried_backward", "carry_backward", "state_down_sweep", "state_sweep"), 64
)
# Products of transitions, from memory to memory: their tiles need not be narrower where K is larger.
TRANSITIONS = ("transition_sweep", "carry_transitions", "carry_paths_backward", "transition_down_sweep")
# Stages on tiles of a chunk's tokens, and in how many parts they take a chunk of 128.
PARTS = {
    "chunk_state": 1, "output": 2, "in_chunk": 2, "walk_backward": 2, "scores_backward": 2, "writes_backward": 1,
    "lower_backward": 2, "keys_backward": 2,
}  # fmt: skip


def choose_chunk_size(q: Tensor, k: Tensor, v: Tensor, prescribed: int) -> int:
    """States prescribe theirs (0: none does)."""
    return prescribed or (128 if products_of(q, k, v) == torch.bfloat16 else 64)


def products_of(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """The key of DOT_TYPES. Heads of up to 32 numbers are multiplied as float16's are: bfloat16 products of tiles as
    narrow as that came out wrong on Hopper (triton 3.6; docs/performance.md)."""
    dtype = common_dtype(q, k, v)
    is_narrow = min(q.shape[3], v.shape[3]) <= 32
    return torch.float16 if is_narrow and dtype == torch.bfloat16 else dtype


class DeltaRule(Call):
    """One call, with the arrays between the stages."""

    def __init__(
        self,
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, level_scales: Tensor, nodes: Tensor | None,
        cu_seqlens: Tensor | None, starts: Tensor | None, scale: float, chunk_size: int,
    ) -> None:  # fmt: skip
        super().__init__(
            q, k, v, log_decay, level_scales, nodes, cu_seqlens, starts, scale, chunk_size, products_of(q, k, v), STOREY
        )  # fmt: skip
        self.beta, self.precision = beta, dict(PRECISION=self.dots["PRECISION"])

    def tile(self, stage: str, size: int) -> int:
        """Columns of one tile of matrices that have `size` of them."""
        wide = self.dtype == torch.bfloat16 and (self.K <= 128 or stage in TRANSITIONS)
        return min(LAUNCHES[stage].tile if wide else 64, max(16, triton.next_power_of_2(size)))

    def parts(self, stage: str) -> int:
        return PARTS[stage] if self.C > 64 else 1

    def options(self, stage: str) -> dict[str, int]:
        """The tile of the keys' columns, and the compiler's."""
        launch, TK = LAUNCHES[stage], self.tile(stage, self.K)
        rows = self.C // self.parts(stage) if stage in PARTS else TK
        return dict(TK=TK, num_warps=launch.num_warps if rows > 64 else 4, num_stages=launch.num_stages)

    def columns(self, stage: str, transition: bool = False) -> dict[str, int]:
        """What is right of the K rows of a state, or of a transition, and its tile."""
        width = self.K if transition else self.V
        return dict(V=width, BV=min(self.tile(stage, width), VALUE_TILES.get(stage, 128)))

    def wide(self, stage: str, transition: bool = False) -> dict[str, int]:
        return self.columns(stage, transition) | self.options(stage)

    def tiles(self, stage: str, transition: bool = False) -> int:
        """How many tiles a state, or a transition, has across."""
        columns = self.columns(stage, transition)
        return triton.cdiv(columns["V"], columns["BV"])

    def all_tiles(self, stage: str, transition: bool = False) -> int:
        return triton.cdiv(self.K, self.tile(stage, self.K)) * self.tiles(stage, transition)

    @cached_property
    def carried_columns(self) -> int:
        """Columns of the states that each run gets from before it."""
        return min(self.layout.run_levels, max(0, self.layout.cap - STOREY) + 1)

    def build_states(self) -> None:
        """Each chunk's inverse, the Fenwick array, and what is carried to the runs."""
        y, H, K, V, C = self.layout, self.H, self.K, self.V, self.C
        self.inverse = self.empty(y.chunks, H, C, C, dtype=self.dtype)
        self.cumulative = self.empty(y.chunks, H, C)
        J = min(C, 64)
        chunk_inverse_kernel[(y.chunks * H,)](
            self.k, self.beta, self.log_decay, self.inverse, self.cumulative, y.table, *self.sizes, self.R,
            *self.strides("k", "beta", "log_decay"),
            K=K, C=C, J=J, LOG_J=log2(J), DOT=self.dots["DOT"], PRECISION="tf32x3",
            **self.packed, **self.options("chunk_inverse"),
        )  # fmt: skip
        self.transitions, self.rights = (self.empty(y.chunks, H, K, K, dtype=self.dtype) for _ in range(2))
        self.slots = self.empty(y.chunks, H, K, V, dtype=self.dtype)
        chunk_state_kernel[(y.chunks * H,)](
            self.k, self.v, self.beta, self.inverse, self.cumulative, self.transitions, self.rights, self.slots,
            y.table, *self.sizes, self.R, y.cap, *self.strides("k", "v", "beta"),
            K=K, C=C, **self.dots, **self.packed, **self.wide("chunk_state"),
        )  # fmt: skip
        for storey, runs in enumerate(y.runs):
            transition_sweep_kernel[(runs * H,)](
                self.transitions, self.rights, y.run_tables[storey], *self.sizes[1:], y.cap, storey,
                K=K, FIRST=storey == 0,
                **self.precision, **self.packed, **self.options("transition_sweep"),
            )  # fmt: skip
        for storey, runs in enumerate(y.runs):
            state_sweep_kernel[(runs * H * self.tiles("state_sweep"),)](
                self.transitions, self.rights, self.slots, self.nodes, y.run_tables[storey], *self.sizes[1:], y.cap,
                storey,
                K=K, NODES=self.has_nodes,
                **self.precision, **self.packed, **self.wide("state_sweep"),
            )  # fmt: skip
        self.carried, self.paths = self.carry(y.runs[0], y.run_levels, self.carried_columns, self.dtype, ends=False)

    def carry(
        self, carriers: int, candidates: int, columns: int, dtype: torch.dtype, ends: bool
    ) -> tuple[Tensor, Tensor]:
        """States of the blocks on each carrier's walk [carrier, column, H, K, V], and the transitions on the way."""
        y, H, K, V = self.layout, self.H, self.K, self.V
        paths = self.empty(carriers, candidates, H, K, K, dtype=self.dtype)
        carried = self.empty(carriers, columns, H, K, V, dtype=dtype)
        if columns == 0:
            return carried, paths
        table = y.run_tables[0]
        carry_transitions_kernel[(carriers * H,)](
            self.transitions, paths, table, y.ends, *self.sizes, y.cap, candidates,
            K=K, C=self.C, ENDS=ends,
            **self.precision, **self.packed, **self.options("carry_transitions"),
        )  # fmt: skip
        carry_states_kernel[(carriers * columns * H * self.tiles("carry_states"),)](
            self.slots, self.nodes, paths, carried, table, y.ends, *self.sizes, y.cap, columns, candidates,
            K=K, C=self.C, ENDS=ends, NODES=self.has_nodes,
            **self.precision, **self.packed, **self.wide("carry_states"),
        )  # fmt: skip
        return carried, paths

    def output(self) -> Tensor:
        y = self.layout
        out = self.empty(self.B, self.T, self.H, self.V, dtype=self.v.dtype)
        output_kernel[(y.chunks * self.parts("output") * self.H * self.tiles("output"),)](
            self.q, self.k, self.v, self.beta, self.level_scales, self.inverse, self.cumulative, self.transitions,
            self.slots, self.nodes, self.carried, out, y.table, y.first_runs,
            *self.sizes, self.R, self.L, y.cap, self.scale, self.carried_columns,
            *self.strides("q", "k", "v", "beta", "level_scales"),
            K=self.K, C=self.C, LOG_C=log2(self.C), J=self.C // self.parts("output"), LINEAR=self.L == 1,
            NODES=self.has_nodes,
            **self.dots, **self.packed, **self.wide("output"),
        )  # fmt: skip
        return out

    def final_blocks(self) -> Tensor:
        """[N, M, H, K, V]: what each sequence leaves at the start of its unfinished chunk."""
        return self.carry(self.layout.sequences, READS, self.layout.cap + 1, torch.float32, ends=True)[0]

    def backward(
        self, do: Tensor, dblocks: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor, dlog_decay: Tensor, dbeta: Tensor,
        dlevel_scales: Tensor,
    ) -> Tensor | None:  # fmt: skip
        """Writes the gradients of these heads, dq and dk [B, T, H, K] of each by itself; returns dnodes."""
        y, H, K, C = self.layout, self.H, self.K, self.C
        self.build_states()
        effective, weights = (self.empty(y.chunks, H, C, C, dtype=self.dtype) for _ in range(2))
        seen = self.empty(y.chunks, H, C, K, dtype=self.dtype)
        in_chunk_kernel[(y.chunks * self.parts("in_chunk") * H,)](
            self.q, self.k, self.beta, self.level_scales, self.inverse, self.cumulative, effective, weights, seen,
            y.table, *self.sizes, self.R, self.L, self.scale, *self.strides("q", "k", "beta", "level_scales"),
            K=K, C=C, LOG_C=log2(C), PARTS=self.parts("in_chunk"), LINEAR=self.L == 1,
            **self.dots, **self.packed, **self.options("in_chunk"),
        )  # fmt: skip
        met, dmet = (self.empty(y.chunks, H, int(MET), C, K, dtype=self.dtype) for _ in range(2))
        o_ = do.stride()[:3]
        walk_backward_kernel[(y.chunks * self.parts("walk_backward") * H,)](
            self.level_scales, seen, self.transitions, self.slots, self.nodes, self.carried, do, met, dmet,
            dlevel_scales, y.table, y.first_runs,
            *self.sizes, self.L, y.cap, self.carried_columns,
            *self.strides("level_scales"), *o_, dlevel_scales.stride(1),
            C=C, K=K, LOG_C=log2(C), PARTS=self.parts("walk_backward"), NODES=self.has_nodes,
            **self.dots, **self.packed, **self.wide("walk_backward"),
        )  # fmt: skip
        dseen = seen
        dslots, dtransitions, dnodes = self.state_gradients(met, dmet, do, dblocks)
        del met, dmet, self.carried, self.paths, self.slots, self.transitions, self.rights
        parts, constants = self.parts("scores_backward"), dict(K=K, C=C, **self.packed)
        dscores = torch.empty_like(effective)
        flow, held, shares = *(self.empty(y.chunks, H, C) for _ in range(2)), self.empty(y.chunks, H, 2, parts, C)
        scores_backward_kernel[(y.chunks * parts * H,)](
            self.q, self.k, self.v, self.beta, self.level_scales, self.inverse, self.cumulative, effective, dseen, do,
            dq, dscores, flow, shares, dlevel_scales, y.table,
            *self.sizes, self.R, self.L, self.scale,
            *self.strides("q", "k", "v", "beta", "level_scales"), *o_, dq.stride(1), dlevel_scales.stride(1),
            LOG_C=log2(C), PARTS=parts, LINEAR=self.L == 1,
            **constants, **self.dots, **self.wide("scores_backward"),
        )  # fmt: skip
        key_tiles, value_tiles = (self.tiles("writes_backward", kind) for kind in (True, False))
        dkeys, sums = torch.empty_like(seen), self.empty(y.chunks, H, key_tiles + value_tiles, C)
        writes_backward_kernel[(y.chunks * (2 * key_tiles + value_tiles) * H,)](
            self.k, self.v, self.beta, self.cumulative, self.inverse, effective, weights, dslots, dtransitions, dseen,
            do, dkeys, dk, dv, sums, y.table,
            *self.sizes, self.R, *self.strides("k", "v", "beta"), *o_, dk.stride(1), dv.stride(1),
            **constants, **self.dots, **self.wide("writes_backward"),
        )  # fmt: skip
        dlower = weights  # which nobody reads any more
        lower_backward_kernel[(y.chunks * parts * H,)](
            self.k, self.beta, self.cumulative, self.inverse, effective, dscores, dkeys, sums,
            dlower, flow, held, shares, dbeta, y.table,
            *self.sizes, self.R, *self.strides("k", "beta"), dbeta.stride(1),
            PARTS=parts, KEY_TILES=key_tiles, VALUE_TILES=value_tiles,
            **constants, **self.dots, **self.options("lower_backward"),
        )  # fmt: skip
        keys_backward_kernel[(y.chunks * parts * H * triton.cdiv(K, self.tile("keys_backward", K)),)](
            self.q, self.k, self.cumulative, dscores, dkeys, dlower, dk, y.table,
            *self.sizes, self.R, self.scale, *self.strides("q", "k"), dk.stride(1),
            PARTS=parts, **constants, **self.dots, **self.options("keys_backward"),
        )  # fmt: skip
        decay_backward_kernel[(y.chunks * H,)](
            self.log_decay, self.cumulative, dtransitions, flow, held, shares, dlog_decay, y.table, *self.sizes,
            *self.strides("log_decay"), dlog_decay.stride(1),
            PARTS=parts, **constants, **self.options("decay_backward"),
        )  # fmt: skip
        return dnodes

    def state_gradients(
        self, met: Tensor, dmet: Tensor, do: Tensor, dblocks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of every chunk's own state and transition, and of the nodes."""
        y, H, K, columns = self.layout, self.H, self.K, self.carried_columns
        dslots, dtransitions = torch.empty_like(self.slots), torch.empty_like(self.transitions)
        if columns == 0:  # nobody reads the ends of runs
            dslots.zero_()
            dtransitions.zero_()
        dnodes = None if self.nodes is None else torch.zeros_like(self.nodes, dtype=torch.float32)
        gradient = {True: dtransitions, False: dslots}
        constants = dict(K=K, **self.dots, **self.packed)
        strides = (*self.level_scales.stride()[:3], *do.stride()[:3])
        for kind in (True, False):
            state_backward_kernel[(y.chunks * H * self.all_tiles("state_backward", kind),)](
                met, dmet, self.level_scales, do, gradient[kind], y.table, *self.sizes, self.L, y.cap, *strides,
                C=self.C, LOG_C=log2(self.C), TRANSITION=kind,
                **constants, **self.wide("state_backward", kind),
            )  # fmt: skip
        if dnodes is not None:
            node_backward_kernel[(y.sequences * (1 << STOREY) * H * self.all_tiles("state_backward"),)](
                met, dmet, self.level_scales, do, dnodes, y.table, y.ends, *self.sizes, self.L, y.cap, *strides,
                C=self.C, LOG_C=log2(self.C), **constants, **self.wide("state_backward"),
            )  # fmt: skip
        if columns > 0:
            dcarried, dpaths = torch.empty_like(self.carried), torch.empty_like(self.paths)
            carried_backward_kernel[(y.runs[0] * columns * H * self.all_tiles("carried_backward"),)](
                met, dmet, self.level_scales, do, dcarried, y.table, y.run_tables[0], *self.sizes, self.L, y.cap,
                columns, *strides,
                C=self.C, LOG_C=log2(self.C), **constants, **self.wide("carried_backward"),
            )  # fmt: skip
            counts = (y.cap, columns, y.run_levels)
            self.paths_backward(dcarried, dpaths, y.runs[0], *counts[1:], ends=False)
            for kind in (True, False):
                carry_backward_kernel[(y.runs[0] * H * self.all_tiles("carry_backward", kind),)](
                    self.paths, dpaths, dcarried, gradient[kind], y.run_tables[0], *self.sizes[1:], *counts,
                    TRANSITION=kind, **constants, **self.wide("carry_backward", kind),
                )  # fmt: skip
            if dnodes is not None:
                carried_nodes_backward_kernel[(y.sequences * (y.cap + 1) * H * self.all_tiles("carry_backward"),)](
                    self.paths, dpaths, dcarried, dnodes, y.run_tables[0], y.ends, y.first_runs, *self.sizes[1:],
                    *counts, **constants, **self.wide("carry_backward"),
                )  # fmt: skip
        if dblocks is not None:
            _, paths = self.carry(y.sequences, READS, y.cap + 1, torch.float32, ends=True)
            dpaths, dblocks = torch.empty_like(paths), dblocks.contiguous()
            self.paths_backward(dblocks, dpaths, y.sequences, y.cap + 1, READS, ends=True)
            for kind in (True, False):
                ends_backward_kernel[(y.sequences * READS * H * self.all_tiles("carry_backward", kind),)](
                    paths, dpaths, dblocks, gradient[kind], dnodes, y.ends, *self.sizes, y.cap, y.cap + 1, READS,
                    C=self.C, TRANSITION=kind, NODES=self.has_nodes,
                    **constants, **self.wide("carry_backward", kind),
                )  # fmt: skip
        nodes = dict(NODES=self.has_nodes)
        for storey in reversed(range(len(y.runs))):
            state_down_sweep_kernel[(y.runs[storey] * H * self.tiles("state_down_sweep"),)](
                self.transitions, self.rights, dslots, dnodes, y.run_tables[storey], *self.sizes[1:], y.cap, storey,
                K=K, **nodes, **self.precision, **self.packed, **self.wide("state_down_sweep"),
            )  # fmt: skip
            transition_down_sweep_kernel[(y.runs[storey] * H,)](
                self.transitions, self.rights, self.slots, self.nodes, dtransitions, dslots, y.run_tables[storey],
                *self.sizes[1:], y.cap, storey,
                K=K, **nodes, **self.precision, **self.packed, **self.wide("transition_down_sweep"),
            )  # fmt: skip
        return dslots, dtransitions, dnodes

    def paths_backward(
        self, dcarried: Tensor, dpaths: Tensor, carriers: int, columns: int, candidates: int, ends: bool
    ) -> None:
        y = self.layout
        carry_paths_backward_kernel[(carriers * self.H,)](
            self.transitions, self.slots, self.nodes, dcarried, dpaths, y.run_tables[0], y.ends,
            *self.sizes, y.cap, columns, candidates,
            ENDS=ends, NODES=self.has_nodes,
            K=self.K, C=self.C,
            **self.dots, **self.packed, **self.wide("carry_paths_backward"),
        )  # fmt: skip


def gradients(
    do: Tensor, dblocks: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, level_scales: Tensor, nodes: Tensor | None,
    cu_seqlens: Tensor | None, starts: Tensor | None, scale: float, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dq, dk, dv, dlog_decay, dbeta, dlevel_scales, dnodes: slab after slab, so that what is kept of each chunk stays
    small."""
    (K, V), H, R, C = (q.shape[3], v.shape[3]), v.shape[2], v.shape[2] // q.shape[2], chunk_size
    chunks = len(q) * triton.cdiv(q.shape[1], C) + (0 if cu_seqlens is None else len(cu_seqlens))
    numbers = 3 * K * K + 2 * K * V + (2 * int(MET) + 1) * C * K + 4 * C * C
    do = in_rows(do)

    dv, dlog_decay, dbeta = like(v), like(log_decay), like(beta)
    dlevel_scales = like(level_scales).zero_()  # of what is not read
    dnodes = None if nodes is None else like(nodes, torch.float32)
    dq, dk = (like(x) if R == 1 else like(x, torch.float32).zero_() for x in (q, k))
    limit = max(SLAB_BYTES, 3 * sum(x.numel() * x.element_size() for x in (q, k, v, do)) // 2)
    for h in slabs(chunks, q.shape[2], H, numbers * DOT_TYPES[products_of(q, k, v)][0].itemsize, limit):
        g = slice(h.start // R, (h.stop - 1) // R + 1)
        call = DeltaRule(
            q[:, :, g], k[:, :, g], v[:, :, h], log_decay[:, :, h], beta[:, :, h], level_scales[:, :, h],
            None if nodes is None else nodes[:, :, h], cu_seqlens, starts, scale, C,
        )  # fmt: skip
        dblocks_h = None if dblocks is None else dblocks[:, :, h]
        views = (dv[:, :, h], dlog_decay[:, :, h], dbeta[:, :, h], dlevel_scales[:, :, h])
        dq_h, dk_h = (x[:, :, g] if R == 1 else call.empty(*x.shape[:2], call.H, K) for x in (dq, dk))
        dnodes_h = call.backward(do[:, :, h], dblocks_h, dq_h, dk_h, *views)
        if R > 1:
            dq[:, :, g] += dq_h.unflatten(2, (g.stop - g.start, -1)).sum(3)
            dk[:, :, g] += dk_h.unflatten(2, (g.stop - g.start, -1)).sum(3)
        if dnodes is not None and dnodes_h is not None:
            dnodes[:, :, h] = dnodes_h
    return dq.to(q.dtype), dk.to(k.dtype), dv, dlog_decay, dbeta, dlevel_scales, dnodes

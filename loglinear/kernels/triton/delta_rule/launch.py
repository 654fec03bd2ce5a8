"""The stages in order: what `run_delta_rule` computes, and its gradients.

Forward: triangular inverses, transitions, states, what is carried to the runs, output. It keeps its inputs, the
inverses and the cumulative decays; the backward makes the states again.
"""

# B batch, T time, H heads, G groups, K key, V value, L levels
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loglinear.fenwick import block_cap, log2
from loglinear.kernels.triton.call import Call
from loglinear.kernels.triton.delta_rule.carry import carry_kernel, final_blocks_kernel
from loglinear.kernels.triton.delta_rule.carry_backward import (
    carry_prefixes_backward_kernel,
    carry_states_backward_kernel,
    final_prefixes_backward_kernel,
    final_states_backward_kernel,
)
from loglinear.kernels.triton.delta_rule.chunk_inverse import chunk_inverse_kernel
from loglinear.kernels.triton.delta_rule.chunk_state import chunk_state_kernel
from loglinear.kernels.triton.delta_rule.in_chunk import in_chunk_kernel
from loglinear.kernels.triton.delta_rule.keys_backward import (
    decay_backward_kernel,
    keys_backward_kernel,
    lower_backward_kernel,
    writes_backward_kernel,
)
from loglinear.kernels.triton.delta_rule.layout import RUN, Storey, layout
from loglinear.kernels.triton.delta_rule.output import output_kernel
from loglinear.kernels.triton.delta_rule.products import dots_of, products_of, state_dtype
from loglinear.kernels.triton.delta_rule.scores_backward import scores_backward_kernel
from loglinear.kernels.triton.delta_rule.state_backward import (
    carried_backward_kernel,
    prefix_backward_kernel,
    state_backward_kernel,
)
from loglinear.kernels.triton.delta_rule.tiling import Tiling
from loglinear.kernels.triton.delta_rule.transport import transport_kernel
from loglinear.kernels.triton.delta_rule.transport_backward import (
    transition_backward_kernel,
    transport_backward_kernel,
)
from loglinear.kernels.triton.delta_rule.walk_backward import walk_backward_kernel
from loglinear.kernels.triton.inputs import in_rows, like, slabs

BUILD = ("chunk_state", "transport", "carry")
STAGES = {
    "forward": ("chunk_inverse", *BUILD, "output"),
    "backward": (
        *BUILD, "in_chunk", "walk_backward", "state_backward", "prefix_backward",
        "carried_backward", "carry_states_backward", "carry_prefixes_backward", "transport_backward",
        "transition_backward", "scores_backward", "writes_backward", "lower_backward", "keys_backward",
        "decay_backward",
    ),
}  # fmt: skip
SLAB_BYTES = 2 << 30  # of what a backward keeps of each chunk, at least; for long inputs 1.5 times their size


@dataclass
class Entries:
    """What one storey's entries are, [entry, H, ...], and what they read: of their run `kept`, from its start through
    `prefixes`, what was carried there; transitions with log2 of their decay apart."""

    storey: Storey
    transitions: Tensor
    totals: Tensor
    kept: Tensor
    prefixes: Tensor
    prefix_totals: Tensor
    carried: Tensor


class DeltaRule(Call):
    """One call, with the arrays between the stages."""

    def __init__(
        self,
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, level_scales: Tensor, nodes: Tensor | None,
        cu_seqlens: Tensor | None, starts: Tensor | None, scale: float, chunk_size: int, final: bool,
    ) -> None:  # fmt: skip
        self.products = products_of(q, k, v)
        super().__init__(q, k, v, log_decay, level_scales, nodes, scale, chunk_size, self.products)
        self.layout = layout(self.B, self.T, self.C, self.L, cu_seqlens, starts, final)
        self.packed, self.sizes = dict(PACKED=self.layout.packed), (self.T, self.layout.chunks_per_row, self.H)
        self.beta, self.starts = beta, starts
        self.tiling = Tiling(self.K, self.V, self.C, self.dtype)

    def invert(self) -> tuple[Tensor, Tensor]:
        """Each chunk's inverse, and its cumulative log decay."""
        y, H, K, C = self.layout, self.H, self.K, self.C
        self.inverse = self.empty(y.chunks, H, C, C, dtype=self.dtype)
        self.cumulative = self.empty(y.chunks, H, C)
        J = min(C, 64)
        chunk_inverse_kernel[(y.chunks * H,)](
            self.k, self.beta, self.log_decay, self.inverse, self.cumulative, y.table, *self.sizes, self.R,
            *self.strides("k", "beta", "log_decay"),
            K=K, C=C, J=J, LOG_J=log2(J),
            **dots_of("chunk_inverse", self.products), **self.packed, **self.tiling.options("chunk_inverse"),
        )  # fmt: skip
        return self.inverse, self.cumulative

    def build_states(self) -> None:
        """All that chunks read."""
        y, H, K, V, C = self.layout, self.H, self.K, self.V, self.C
        transitions, states = (self.empty(y.chunks, H, K, width, dtype=self.dtype) for width in (K, V))
        totals = self.cumulative[:, :, -1].contiguous()
        for v, out, kind in ((self.v, states, False), (self.k, transitions, True)):
            chunk_state_kernel[(y.chunks * H * self.tiling.tiles("chunk_state", kind),)](
                self.k, v, self.beta, self.inverse, self.cumulative, out, y.table, *self.sizes, self.R,
                *self.strides("k"), *v.stride()[:3], *self.strides("beta"), self.inverse.stride(0),
                C=C, TRANSITION=kind, K=K, **dots_of("chunk_state", self.products), **self.packed,
                **self.tiling.wide("chunk_state", kind),
            )  # fmt: skip
        self.storeys: list[Entries] = []
        for storey in y.storeys:
            entries, transitions, totals, states = self.transport(storey, transitions, totals, states)
            self.storeys.append(entries)
        if self.nodes is not None:
            self.storeys[-1].carried = self.nodes[:, -1:].contiguous()
        for below, entries in zip(reversed(self.storeys[:-1]), reversed(self.storeys[1:]), strict=True):
            s, places = entries.storey, below.storey.columns
            below.carried = self.empty(s.entries, places, H, K, V, dtype=self.dtype)
            carry_kernel[(s.runs * RUN * places * H * self.tiling.tiles("carry"),)](
                entries.kept, entries.prefixes, entries.prefix_totals, entries.carried, below.carried, s.table,
                s.per_row, H, *s.older, places,
                K=K, NODES=self.has_nodes, **self.dots, **self.packed, **self.tiling.wide("carry"),
            )  # fmt: skip

    def transport(
        self, storey: Storey, transitions: Tensor, totals: Tensor, states: Tensor
    ) -> tuple[Entries, Tensor, Tensor, Tensor]:
        """What the entries read, and the next storey's transitions, their decays, and states."""
        H, K, V = self.H, self.K, self.V
        is_last = storey is self.layout.storeys[-1]
        runs = 0 if is_last else storey.runs
        kept = self.empty(storey.entries, storey.slots, H, K, V, dtype=self.dtype)
        prefixes, prefix_totals = torch.empty_like(transitions), torch.empty_like(totals)
        ends, end_transitions = (self.empty(runs, H, K, width, dtype=self.dtype) for width in (V, K))
        end_totals = self.empty(runs, H)
        transport_kernel[(storey.runs * H * self.tiling.column_tiles("transport"),)](
            transitions, totals, states, self.nodes, kept, prefixes, prefix_totals, ends, end_transitions, end_totals,
            storey.table, storey.per_row, H, self.layout.cap, storey.slots, storey.first_level,
            K=K, ENDS=not is_last, NODES=self.has_nodes, **self.dots, **self.packed, **self.tiling.wide("transport"),
        )  # fmt: skip
        entries = Entries(storey, transitions, totals, kept, prefixes, prefix_totals, self.empty(0, dtype=self.dtype))
        return entries, end_transitions, end_totals, ends

    def output(self) -> Tensor:
        y, own = self.layout, self.storeys[0]
        out = self.empty(self.B, self.T, self.H, self.V, dtype=self.v.dtype)
        output_kernel[(y.chunks * self.tiling.parts("output") * self.H * self.tiling.tiles("output"),)](
            self.q, self.k, self.v, self.beta, self.level_scales, self.inverse, self.cumulative, own.kept,
            own.prefixes, own.prefix_totals, own.carried, out, y.table, y.first_runs,
            *self.sizes, self.R, self.L, self.scale, own.storey.slots, own.storey.columns,
            *self.strides("q", "k", "v", "beta", "level_scales"),
            K=self.K, C=self.C, LOG_C=log2(self.C), J=self.C // self.tiling.parts("output"), LINEAR=self.L == 1,
            NODES=self.has_nodes,
            **self.dots, **self.packed, **self.tiling.wide("output"),
        )  # fmt: skip
        return out

    def final_blocks(self) -> Tensor:
        """[N, M, H, K, V]: what each sequence leaves at the start of its unfinished chunk."""
        y, own, blocks = self.layout, self.storeys[0], self.layout.cap + 1
        out = self.empty(y.sequences, blocks, self.H, self.K, self.V)
        final_blocks_kernel[(y.sequences * blocks * self.H * self.tiling.tiles("carry"),)](
            own.kept, own.prefixes, own.prefix_totals, own.carried, out, y.ends, y.first_runs,
            *self.sizes[1:], *own.storey.older, blocks,
            K=self.K, NODES=self.has_nodes, **self.dots, **self.packed, **self.tiling.wide("carry"),
        )  # fmt: skip
        return out

    def backward(
        self, inverse: Tensor, cumulative: Tensor, do: Tensor, dblocks: Tensor | None,
        dq: Tensor, dk: Tensor, dv: Tensor, dlog_decay: Tensor, dbeta: Tensor, dlevel_scales: Tensor,
    ) -> Tensor | None:  # fmt: skip
        """Writes the gradients of these heads, dq and dk [B, T, H, K] of each by itself; returns dnodes. inverse and
        cumulative are the forward's, a slab of all heads' perhaps."""
        y, H, K, C = self.layout, self.H, self.K, self.C
        assert len(inverse) == y.chunks
        self.inverse, self.cumulative = inverse, cumulative.contiguous()
        self.build_states()
        effective, weights = (self.empty(y.chunks, H, C, C, dtype=self.dtype) for _ in range(2))
        seen = self.empty(y.chunks, H, C, K, dtype=self.dtype)
        in_chunk_kernel[(y.chunks * self.tiling.parts("in_chunk") * H,)](
            self.q, self.k, self.beta, self.level_scales, self.inverse, self.cumulative, effective, weights, seen,
            y.table, *self.sizes, self.R, self.L, self.scale,
            *self.strides("q", "k", "beta", "level_scales"), inverse.stride(0),
            K=K, C=C, LOG_C=log2(C), PARTS=self.tiling.parts("in_chunk"), LINEAR=self.L == 1,
            **self.dots, **self.packed, **self.tiling.options("in_chunk"),
        )  # fmt: skip
        own = self.storeys[0]
        dseen, brought, dbrought = (torch.empty_like(seen) for _ in range(3))
        o_ = do.stride()[:3]
        walk_backward_kernel[(y.chunks * self.tiling.parts("walk_backward") * H,)](
            self.level_scales, seen, own.kept, own.prefixes, own.prefix_totals, own.carried, do, dseen, brought,
            dbrought, dlevel_scales, y.table, y.first_runs,
            *self.sizes, self.L, own.storey.slots, own.storey.columns,
            *self.strides("level_scales"), *o_, dlevel_scales.stride(1),
            K=K, C=C, LOG_C=log2(C), PARTS=self.tiling.parts("walk_backward"), NODES=self.has_nodes,
            **self.dots, **self.packed, **self.tiling.wide("walk_backward"),
        )  # fmt: skip
        reads = self.read_gradients(seen, brought, dbrought, do, dblocks)
        del seen, brought, dbrought, own  # their memory is what the next ones take
        dslots, dtransitions, dnodes = self.state_gradients(*reads)
        del reads, self.storeys
        parts, constants = self.tiling.parts("scores_backward"), dict(K=K, C=C, **self.packed)
        dscores = torch.empty_like(effective)
        flow, held, shares = *(self.empty(y.chunks, H, C) for _ in range(2)), self.empty(y.chunks, H, 2, parts, C)
        scores_backward_kernel[(y.chunks * parts * H,)](
            self.q, self.k, self.v, self.beta, self.level_scales, self.inverse, self.cumulative, effective, dseen, do,
            dq, dscores, flow, shares, dlevel_scales, y.table,
            *self.sizes, self.R, self.L, self.scale,
            *self.strides("q", "k", "v", "beta", "level_scales"), *o_, dq.stride(1), dlevel_scales.stride(1),
            inverse.stride(0),
            LOG_C=log2(C), PARTS=parts, LINEAR=self.L == 1,
            **constants, **self.dots, **self.tiling.wide("scores_backward"),
        )  # fmt: skip
        key_tiles = self.tiling.key_tiles("writes_backward")
        value_tiles = self.tiling.tiles("writes_backward")
        dkeys, sums = self.empty(y.chunks, H, C, K), self.empty(y.chunks, H, key_tiles + value_tiles, C)
        writes_backward_kernel[(y.chunks * (2 * key_tiles + value_tiles) * H,)](
            self.k, self.v, self.beta, self.cumulative, self.inverse, effective, weights, dslots, dtransitions, dseen,
            do, dkeys, dk, dv, sums, y.table,
            *self.sizes, self.R, *self.strides("k", "v", "beta"), *o_, dk.stride(1), dv.stride(1), inverse.stride(0),
            **constants, **self.dots, **self.tiling.wide("writes_backward"),
        )  # fmt: skip
        dlower = weights  # which nobody reads any more
        lower_backward_kernel[(y.chunks * parts * H,)](
            self.k, self.beta, self.cumulative, self.inverse, effective, dscores, dkeys, sums,
            dlower, flow, held, shares, dbeta, y.table,
            *self.sizes, self.R, *self.strides("k", "beta"), dbeta.stride(1), inverse.stride(0),
            PARTS=parts, KEY_TILES=key_tiles, VALUE_TILES=value_tiles,
            **constants, **self.dots, **self.tiling.options("lower_backward"),
        )  # fmt: skip
        keys_backward_kernel[(y.chunks * parts * H * self.tiling.key_tiles("keys_backward"),)](
            self.q, self.k, self.cumulative, dscores, dkeys, dlower, dk, y.table,
            *self.sizes, self.R, self.scale, *self.strides("q", "k"), dk.stride(1),
            PARTS=parts, **constants, **self.dots, **self.tiling.options("keys_backward"),
        )  # fmt: skip
        decay_backward_kernel[(y.chunks * H,)](
            self.log_decay, self.cumulative, dtransitions, flow, held, shares, dlog_decay, y.table, *self.sizes,
            *self.strides("log_decay"), dlog_decay.stride(1),
            PARTS=parts, **constants, **self.tiling.options("decay_backward"),
        )  # fmt: skip
        return dnodes

    def read_gradients(
        self, seen: Tensor, brought: Tensor, dbrought: Tensor, do: Tensor, dblocks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of what chunks read: the states of their runs, prefixes, and what was carried to the runs."""
        y, H, K, C, own = self.layout, self.H, self.K, self.C, self.storeys[0]
        s, constants = own.storey, dict(K=K, **self.dots, **self.packed)
        nodes, of_chunks = dict(NODES=self.has_nodes), dict(C=C, LOG_C=log2(C))
        strides = (*self.level_scales.stride()[:3], *do.stride()[:3])
        dkept, dprefixes, dcarried = (torch.empty_like(x) for x in (own.kept, own.prefixes, own.carried))
        state_backward_kernel[(y.chunks * H * self.tiling.all_tiles("state_backward"),)](
            seen, self.level_scales, do, dkept, y.table, *self.sizes, self.L, s.slots, *strides,
            **of_chunks, **constants, **self.tiling.wide("state_backward"),
        )  # fmt: skip
        prefix_backward_kernel[(y.chunks * H * self.tiling.square_tiles("prefix_backward"),)](
            seen, dbrought, dprefixes, y.table, y.first_runs, *self.sizes, s.columns,
            K=K, C=C, **self.dots, **self.packed, **nodes, **self.tiling.options("prefix_backward"),
        )  # fmt: skip
        if s.columns > 0:
            carried_backward_kernel[(s.runs * s.columns * H * self.tiling.all_tiles("carried_backward"),)](
                brought, self.level_scales, do, dcarried, y.table, s.table, *self.sizes, self.L, s.columns, *strides,
                **of_chunks, **constants, **nodes, **self.tiling.wide("carried_backward"),
            )  # fmt: skip
        if dblocks is not None:
            blocks, dblocks = y.cap + 1, dblocks.contiguous()
            sizes = (y.ends, y.first_runs, *self.sizes[1:], *s.older, blocks)
            final_states_backward_kernel[(y.sequences * blocks * H * self.tiling.all_tiles("carry_states_backward"),)](
                own.prefixes, own.prefix_totals, dblocks, dkept, dcarried, *sizes,
                **constants, **nodes, **self.tiling.wide("carry_states_backward"),
            )  # fmt: skip
            final_prefixes_backward_kernel[(y.sequences * H * self.tiling.square_tiles("carry_prefixes_backward"),)](
                dblocks, own.carried, dprefixes, *sizes,
                **constants, **nodes, **self.tiling.wide("carry_prefixes_backward"),
            )  # fmt: skip
        return dkept, dprefixes, dcarried

    def state_gradients(
        self, dkept: Tensor, dprefixes: Tensor, dcarried: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of every chunk's own state and transition, and of the nodes."""
        y, H, K, own, tiling = self.layout, self.H, self.K, self.storeys[0], self.tiling
        s, constants, nodes = own.storey, dict(K=K, **self.dots, **self.packed), dict(NODES=self.has_nodes)
        gradients = [(dkept, s.slots, dkept, dprefixes)]
        for entries in self.storeys[1:]:
            dreads, places = dcarried, self.storeys[len(gradients) - 1].storey.columns
            s, dprefixes = entries.storey, torch.empty_like(entries.prefixes)
            dcarried = torch.empty_like(entries.carried)
            sizes = (s.table, s.per_row, H, *s.older, places)
            if s.columns > 0:
                carry_states_backward_kernel[(s.runs * s.columns * H * tiling.all_tiles("carry_states_backward"),)](
                    entries.prefixes, entries.prefix_totals, dreads, dcarried, *sizes,
                    **constants, **nodes, **tiling.wide("carry_states_backward"),
                )  # fmt: skip
            carry_prefixes_backward_kernel[(s.runs * RUN * H * tiling.square_tiles("carry_prefixes_backward"),)](
                dreads, entries.carried, dprefixes, *sizes,
                **constants, **nodes, **tiling.wide("carry_prefixes_backward"),
            )  # fmt: skip
            gradients.append((dreads, places, torch.empty_like(entries.kept), dprefixes))
        dnodes = None
        if self.nodes is not None and self.starts is not None:
            dnodes = torch.zeros_like(self.nodes, dtype=torch.float32)
            has_prefix = (self.starts >> min(y.cap, 31)) > 0
            dnodes[:, -1] = torch.where(has_prefix[:, None, None, None], dcarried[:, 0], 0.0)
        dends: Tensor | None = None
        dend_transitions: Tensor | None = None
        for entries, (dreads, places, dkept, dprefixes) in zip(
            reversed(self.storeys), reversed(gradients), strict=True
        ):
            dends, dend_transitions = self.transport_backward(
                entries, dreads, places, dkept, dprefixes, dends, dend_transitions, dnodes
            )
        assert dends is not None and dend_transitions is not None
        return dends, dend_transitions, dnodes

    def transport_backward(
        self, entries: Entries, dreads: Tensor, places: int, dkept: Tensor, dprefixes: Tensor, dends: Tensor | None,
        dend_transitions: Tensor | None, dnodes: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Gradients of the entries' states and transitions, from those of the next storey's."""
        s, H, K = entries.storey, self.H, self.K
        dstates = self.empty(s.entries, H, K, self.V, dtype=self.dtype)
        dtransitions = torch.empty_like(entries.transitions)
        constants = dict(K=K, ENDS=dends is not None, **self.dots, **self.packed)
        transport_backward_kernel[(s.runs * H * self.tiling.column_tiles("transport_backward"),)](
            entries.transitions, entries.totals, dreads, dkept, dprefixes, dends, dend_transitions, dstates, dnodes,
            s.table, s.per_row, H, self.layout.cap, s.slots, s.first_level, places,
            NODES=self.has_nodes, **constants, **self.tiling.wide("transport_backward"),
        )  # fmt: skip
        transition_backward_kernel[(s.runs * RUN * H * self.tiling.square_tiles("transition_backward"),)](
            entries.kept, entries.prefixes, entries.prefix_totals, dkept, dends, dprefixes, dend_transitions,
            dtransitions, s.table, s.per_row, H, s.slots,
            **constants, **self.tiling.wide("transition_backward"),
        )  # fmt: skip
        return dstates, dtransitions


def gradients(
    do: Tensor, dblocks: Tensor | None, inverse: Tensor, cumulative: Tensor,
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, level_scales: Tensor, nodes: Tensor | None,
    cu_seqlens: Tensor | None, starts: Tensor | None, scale: float, chunk_size: int, final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dq, dk, dv, dlog_decay, dbeta, dlevel_scales, dnodes: slab after slab, so that what is kept of each chunk stays
    small."""
    (K, V), H, R, C = (q.shape[3], v.shape[3]), v.shape[2], v.shape[2] // q.shape[2], chunk_size
    chunks = len(inverse)
    slots = min(3, block_cap(level_scales.shape[3], C) + 1)
    numbers = 4 * K * K + 2 * (slots + 1) * K * V + 5 * C * K + 4 * C * C
    do = in_rows(do)

    dv, dlog_decay, dbeta = like(v), like(log_decay), like(beta)
    dlevel_scales = like(level_scales).zero_()  # of what is not read
    dnodes = None if nodes is None else like(nodes, torch.float32)
    dq, dk = (like(x) if R == 1 else like(x, torch.float32).zero_() for x in (q, k))
    limit = max(SLAB_BYTES, 3 * sum(x.numel() * x.element_size() for x in (q, k, v, do)) // 2)
    for h in slabs(chunks, q.shape[2], H, numbers * state_dtype(q, k, v).itemsize, limit):
        g = slice(h.start // R, (h.stop - 1) // R + 1)
        call = DeltaRule(
            q[:, :, g], k[:, :, g], v[:, :, h], log_decay[:, :, h], beta[:, :, h], level_scales[:, :, h],
            None if nodes is None else nodes[:, :, h], cu_seqlens, starts, scale, C, final,
        )  # fmt: skip
        dblocks_h = None if dblocks is None else dblocks[:, :, h]
        views = (dv[:, :, h], dlog_decay[:, :, h], dbeta[:, :, h], dlevel_scales[:, :, h])
        dq_h, dk_h = (x[:, :, g] if R == 1 else call.empty(*x.shape[:2], call.H, K) for x in (dq, dk))
        dnodes_h = call.backward(inverse[:, h], cumulative[:, h], do[:, :, h], dblocks_h, dq_h, dk_h, *views)
        if R > 1:
            dq[:, :, g] += dq_h.unflatten(2, (g.stop - g.start, -1)).sum(3)
            dk[:, :, g] += dk_h.unflatten(2, (g.stop - g.start, -1)).sum(3)
        if dnodes is not None and dnodes_h is not None:
            dnodes[:, :, h] = dnodes_h
    return dq.to(q.dtype), dk.to(k.dtype), dv, dlog_decay, dbeta, dlevel_scales, dnodes

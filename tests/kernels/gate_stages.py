"""Every stage of the scalar gate's kernels beside its twin in kernels.torch: the same inputs, one result a stage.

Per-chunk arrays are compared as [H, chunk, ...]. Cases have blocks of one chunk to the whole past, or fewer than 64
chunks: there the slots of both implementations hold the same states.
"""

# H heads, n chunks, C chunk, K key, V value, L levels
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loglinear.kernels.torch.chunks import reverse_cumsum, to_chunks
from loglinear.kernels.torch.operator import schedule_of
from loglinear.kernels.torch.scalar_gate import ScalarGateSlab
from loglinear.kernels.torch.scalar_gate.chunk_state import chunk_state_backward
from loglinear.kernels.torch.scalar_gate.in_chunk import in_chunk_backward
from loglinear.kernels.torch.scalar_gate.up_sweep import up_sweep_backward
from loglinear.kernels.torch.scalar_gate.walk import walk_backward
from loglinear.kernels.torch.schedule import Schedule
from loglinear.partition import FENWICK, Partition

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Case:
    T: int
    C: int
    L: int
    ends: tuple[int, ...] | None = None
    starts: tuple[int, ...] | None = None  # first chunks of continued sequences
    dtype: torch.dtype = torch.float32
    K: int = 16
    V: int = 24
    G: int = 2  # groups of two heads
    partition: Partition = FENWICK

    @property
    def heads(self) -> slice:
        return slice(0, 2 * self.G)


CASES = {
    "two tiers of one sequence": Case(T=16 * 65 + 5, C=16, L=13, V=16, G=1),
    "one level": Case(T=16 * 9 + 5, C=16, L=1),
    "packed, with an empty sequence": Case(T=16 * 9, C=16, L=13, ends=(0, 40, 40, 41, 144)),
    "continued": Case(T=16 * 7, C=16, L=13, ends=(0, 50, 112), starts=(3, 6)),
    "halves of a chunk": Case(T=128 * 5 + 70, C=128, L=13),
    "radix 4": Case(T=16 * 22 + 5, C=16, L=16, V=16, G=1, partition=Partition(4, 4)),
    "radix 16, two tiers": Case(T=16 * 35 + 5, C=16, L=40, V=16, G=1, partition=Partition(16, 16)),
}


def make(case: Case, device: str = "cpu") -> dict[str, Tensor]:
    """Inputs of one row, in the case's dtype."""
    torch.manual_seed(1)
    G, H, T = case.G, 2 * case.G, case.T
    x = dict(q=torch.randn(1, T, G, case.K), k=torch.randn(1, T, G, case.K) / 4, v=torch.randn(1, T, H, case.V))
    x |= dict(do=torch.randn(1, T, H, case.V))
    x = {name: value.to(case.dtype) for name, value in x.items()}
    x |= dict(log_decay=-torch.rand(1, T, H) * 4 / case.C, level_scales=torch.rand(1, T, H, case.L))
    if case.starts:
        M = case.partition.num_blocks(case.L, case.C)
        is_there = torch.tensor([[(z >> m) & 1 for m in range(M)] for z in case.starts])
        x |= dict(initial=torch.randn(2, M, H, case.K, case.V) * is_there[:, :, None, None, None])
    return {name: value.to(device) for name, value in x.items()}


def tokens(case: Case, value: Tensor) -> Tensor:
    """[1, T, ...] as the schedule takes them: behind the places of buffered tokens, of which there are none."""
    held = len(case.starts or ()) * case.C
    return torch.cat([value.new_zeros(held, *value.shape[2:]), value[0]])


def schedule(case: Case) -> Schedule:
    ends = None if case.ends is None else torch.tensor(case.ends)
    position = torch.tensor(case.starts) * case.C if case.starts else None
    row = tokens(case, torch.empty(1, case.T, 1))
    return schedule_of(row, case.L, position, ends, 1, case.C, True, [*case.partition.numbers])


def torch_stages(case: Case, x: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The results of the stages in kernels.torch."""
    x = {name: value.to("cpu", dtype) for name, value in x.items()}
    operands = [tokens(case, x[name]) for name in ("q", "k", "v", "log_decay", "level_scales")]
    plan = schedule(case)
    slab = ScalarGateSlab((*operands, x.get("initial")), plan, case.heads)
    do, n = to_chunks(tokens(case, x["do"]), case.heads, plan), plan.num_chunks
    gate, q_in = slab.gate, slab.q_in()
    found = dict(up_sweep=slab.states[:, :n], cumulative=gate.log_decay.cumsum(2)[..., 0])
    if case.L > 1:  # over a prefix of one level nobody reads it
        found |= dict(log_decay=slab.log_p[:, :n, 0])
    found |= dict(output=slab.output())

    dscales = torch.zeros_like(slab.level_scales)
    dq, dk, dv = inside = tuple(torch.zeros_like(y) for y in (slab.q, slab.k, slab.v))
    dlog_inside = in_chunk_backward(gate, (slab.q, slab.k, slab.v), slab.mask(), do, slab.pull_mask(dscales), inside)
    dscores = (do @ slab.v.mT) * slab.mask() * gate.products(*[torch.ones_like(slab.q[..., :1])] * 2)
    found |= dict(in_chunk_dv=dv, dscores=dscores.unflatten(0, (case.G, 2)).sum(1))
    dstates, dlog = torch.zeros_like(slab.states), torch.zeros_like(slab.log_p)
    pull = slab.pull_output(do, dscales)
    dq_in = walk_backward(q_in, slab.states, slab.log_p, plan.reads, pull, dstates, dlog)
    dq, flow_in = dq + dq_in * gate.from_start, gate.flow(q_in, dq_in)
    dlog_reads = dlog_inside[..., 0] + reverse_cumsum(flow_in[..., 0])
    found |= dict(dq=dq.unflatten(0, (case.G, 2)).sum(1), dlevel_scales=dscales, dlog_reads=dlog_reads)
    found |= dict(state_backward=dstates[:, :n].clone(), state_dlog=dlog[:, :n, 0].clone())
    up_sweep_backward(slab.states, slab.log_p, slab.rights, dstates, dlog, plan)
    found |= dict(down_sweep=dstates[:, :n], dtotal=dlog[:, :n, 0])
    dk_state, dv_state, flow_out = chunk_state_backward(gate, slab.k, slab.v, dstates[:, : n + 1])
    found |= dict(dk=(dk + dk_state).unflatten(0, (case.G, 2)).sum(1), dv=dv + dv_state)
    found |= dict(dlog_decay=(dlog_inside + gate.gradient(flow_in, flow_out, dlog[:, : n + 1]))[..., 0])
    found = {name: value[:, :n] for name, value in found.items()}
    return found | ({} if slab.initial is None else dict(dinitial=dstates[:, plan.initial]))


def triton_stages(case: Case, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results of the kernels' stages, in the order in which they run."""
    from loglinear.kernels.triton.args import Planes, Rows, Slab
    from loglinear.kernels.triton.inputs import Operands, Sequences
    from loglinear.kernels.triton.launches import Kind, default_plan
    from loglinear.kernels.triton.scalar_gate.backward import chunk_state_backward as state_gifts_backward
    from loglinear.kernels.triton.scalar_gate.backward import decay_backward, down_sweep, state_backward
    from loglinear.kernels.triton.scalar_gate.backward import in_chunk_backward as inside_backward
    from loglinear.kernels.triton.scalar_gate.backward import walk_backward as reads_backward
    from loglinear.kernels.triton.scalar_gate.forward import build_states, inputs_of, output

    device, plan = x["q"].device, schedule(case)
    kinds = [Kind("scalar_gate", direction, case.K, case.V, case.dtype) for direction in ("forward", "backward")]
    forward, backward = (default_plan(kind, case.C) for kind in kinds)
    ends = None if case.ends is None else torch.tensor(case.ends, device=device)
    starts = torch.tensor(case.starts, device=device) if case.starts else None
    operands = Operands(x["q"], x["k"], x["v"], x["log_decay"], None, x["level_scales"], x.get("initial"))
    call = inputs_of(operands, Sequences(ends, starts, partition=case.partition), 1.0, forward)

    def of_chunks(value: Tensor) -> Tensor:
        return value[: plan.num_chunks].transpose(0, 1).double().cpu()

    def of_tokens(value: Tensor) -> Tensor:
        heads = slice(0, value.shape[2])
        return to_chunks(tokens(case, value.double().cpu()), heads, plan)[:, : plan.num_chunks]

    is_token = of_tokens(torch.ones(1, case.T, 2 * case.G, device=device)) > 0

    def of_places(value: Tensor) -> Tensor:
        return torch.where(is_token, of_chunks(value), 0.0)

    states = build_states(call)
    found = dict(up_sweep=of_chunks(states.slots), cumulative=of_chunks(states.cumulative) / LOG2_E)
    if case.L > 1:
        found |= dict(log_decay=of_chunks(states.log_decay) / LOG2_E)
    found |= dict(output=of_tokens(output(call, states, forward["output"])))
    do = Rows.of(x["do"])
    dv, dscales = torch.empty_like(x["v"]), torch.zeros_like(x["level_scales"])
    dq, dk = (Planes.of(call.empty(call.splits, *y.shape)) for y in (x["q"], x["k"]))
    inside = inside_backward(call, states.cumulative, do, Slab.of(dv), Slab.of(dscales), backward["in_chunk_backward"])
    found |= dict(
        in_chunk_dv=of_tokens(dv), dscores=join_pairs(inside.dscores.data.sum(0)[: plan.num_chunks].double().cpu())
    )
    reads = reads_backward(call, states, do, inside, dq, Slab.of(dscales), backward["walk_backward"])
    found |= dict(dq=of_tokens(dq.data.sum(0)), dlevel_scales=of_tokens(dscales))
    found |= dict(dlog_reads=reverse_cumsum(of_places(inside.dlog_row - inside.dlog_column + reads.dlog_walk)))
    dstates = state_backward(call, states, do, reads, backward["state_backward"])
    found |= dict(state_backward=of_chunks(dstates.slots), state_dlog=of_chunks(dstates.log_decay))
    dtotals = down_sweep(call, states, dstates, backward["down_sweep"])
    dtotal = across_tiers(case, dtotals.data, call.tree.tier)
    found |= dict(down_sweep=of_chunks(dstates.slots), dtotal=of_chunks(dtotal))
    launch = backward["chunk_state_backward"]
    dlog_state = state_gifts_backward(call, states, dstates, inside, dk, Slab.of(dv), launch)
    found |= dict(dk=of_tokens(dk.data.sum(0)), dv=of_tokens(dv))
    dlog_decay = torch.empty_like(x["log_decay"])
    decay_backward(call, inside, reads, dlog_state, dtotals, Slab.of(dlog_decay))
    found |= dict(dlog_decay=of_tokens(dlog_decay))
    if dstates.initial is not None:
        found |= dict(dinitial=dstates.initial.flatten(0, 1).transpose(0, 1).double().cpu())
    return found


def join_pairs(pairs: Tensor) -> Tensor:
    """[n, G, pair, rows, rows] as [G, n, C, C]: pairs of halves are 00, 10, 11."""
    if pairs.shape[2] == 1:
        return pairs[:, :, 0].transpose(0, 1)
    top = torch.cat([pairs[:, :, 0], torch.zeros_like(pairs[:, :, 0])], -1)
    return torch.cat([top, torch.cat([pairs[:, :, 1], pairs[:, :, 2]], -1)], -2).transpose(0, 1)


def across_tiers(case: Case, dtotals: Tensor, levels: int) -> Tensor:
    """The gradient of each chunk's own total: those of its entries [tier, part, chunk, H], one of each tier."""
    found, row = [], 0
    lengths = [case.T] if case.ends is None else torch.tensor(case.ends).diff().tolist()
    for z0, length in zip(case.starts or [0] * len(lengths), lengths, strict=True):
        own = -(-length // case.C)
        for z in range(z0, z0 + own):
            entries = [(((z >> levels * tier) + 1) << levels * tier) - 1 for tier in range(len(dtotals))]
            whole = [(tier, e) for tier, e in enumerate(entries) if e < z0 + own]
            found.append(sum(dtotals[tier, :, row + e - z0].sum(0) for tier, e in whole))
        row += own
    return torch.stack(found)

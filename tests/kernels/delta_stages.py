"""Every stage of the delta rule's kernels, called alone: its inputs are a twin's arrays, rounded, NaN where nobody may
read. The results have the twin's names, a `d` in front of those of gradients."""

# H heads, n chunks, C chunk, K key, V value, L levels, J tokens of a part
from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear.kernels.triton.args import Rows, Slab
from loglinear.kernels.triton.delta_rule.backward import (
    carry_in_backward,
    decay_backward,
    final_blocks_backward,
    in_chunk,
    keys_backward,
    lower_backward,
    past_backward,
    run_scan_backward,
    scores_backward,
    walk_backward,
    writes_backward,
)
from loglinear.kernels.triton.delta_rule.forward import (
    carry_in,
    chunk_inverse,
    chunk_state,
    final_blocks,
    inputs_of,
    output,
    run_scan,
)
from loglinear.kernels.triton.delta_rule.products import products_of
from loglinear.kernels.triton.delta_rule.states import (
    Entries,
    EntryGradients,
    Inside,
    InsideGradients,
    Lower,
    Past,
    PastGradients,
    Queries,
    Saved,
    TierStates,
    Totals,
    Writes,
)
from loglinear.kernels.triton.inputs import Operands, Sequences
from loglinear.kernels.triton.launches import Kind, Plan, default_plan
from loglinear.partition import Partition
from tests.kernels.delta_twin import SCALE, Twin, lengths_of, to_chunks
from tests.kernels.gate_stages import LOG2_E, Case

CASES = {
    "one level": Case(T=16 * 9 + 5, C=16, L=1, G=1),
    "a cap inside the first tier": Case(T=16 * 10 + 3, C=16, L=7, K=24, V=16),
    "a cap inside the second tier": Case(T=16 * 34, C=16, L=10, V=16, G=1),
    "packed, with an empty sequence": Case(T=16 * 14, C=16, L=13, ends=(0, 40, 40, 41, 224), G=1),
    "continued, into a third tier": Case(T=16 * 12, C=16, L=12, ends=(0, 130, 192), starts=(3, 61), G=1),
    "continued, a cap inside the first tier": Case(T=16 * 4, C=16, L=8, ends=(0, 50, 64), starts=(3, 6), G=1),
    "halves of a chunk": Case(T=128 * 9 + 70, C=128, L=13, G=1),
    "several tiles": Case(T=64 * 9 + 70, C=64, L=13, K=80, V=72, G=1),
    "radix 4": Case(T=16 * 18 + 5, C=16, L=16, V=16, G=1, partition=Partition(4, 4)),
    "radix 4, a cap among blocks of one size": Case(T=16 * 21, C=16, L=9, V=16, G=1, partition=Partition(4, 4)),
    "radix 4, continued": Case(T=16 * 9, C=16, L=9, ends=(0, 90, 144), starts=(7, 30), G=1, partition=Partition(4, 16)),
    "radix 16": Case(T=16 * 17 + 5, C=16, L=40, V=16, G=1, partition=Partition(16, 16)),
    "radix 16, continued": Case(
        T=16 * 6, C=16, L=9, ends=(0, 50, 96), starts=(14, 40), G=1, partition=Partition(16, 16)
    ),
    "halves of a finest block": Case(T=128 * 5 + 70, C=128, L=13, G=1, partition=Partition(4, 128)),
}


def make(case: Case, device: str = "cpu") -> dict[str, Tensor]:
    """Inputs of one row, in its dtype, and gradients of its results; keys have length 1, beta reaches 1.8."""
    torch.manual_seed(1)
    T, G, H, sequences = case.T, case.G, 2 * case.G, len(lengths_of(case))
    x = dict(q=torch.randn(1, T, G, case.K), k=F.normalize(torch.randn(1, T, G, case.K), dim=-1))
    x |= dict(v=torch.randn(1, T, H, case.V), do=torch.randn(1, T, H, case.V), beta=1.8 * torch.rand(1, T, H))
    x = {name: value.to(case.dtype) for name, value in x.items()}
    x |= dict(log_decay=-torch.rand(1, T, H) / case.C, level_scales=torch.rand(1, T, H, case.L))
    M = case.partition.num_blocks(case.L, case.C)
    blocks = (sequences, M, H, case.K, case.V)
    x |= dict(dblocks=torch.randn(blocks))
    if case.starts:
        is_there = torch.tensor([[case.partition.has_block(z, m, M, case.C) for m in range(M)] for z in case.starts])
        x |= dict(initial=torch.randn(blocks) * is_there[:, :, None, None, None])
    return {name: value.to(device) for name, value in x.items()}


def lower(x: Tensor, J: int = 64) -> Tensor:
    """A lower triangular [.., C, C], NaN in the tiles of J tokens above the diagonal, which nobody may read."""
    i = torch.arange(x.shape[-1]) // J
    return torch.where(i[:, None] < i[None, :], torch.nan, x)


def where(is_there: Tensor, x: Tensor) -> Tensor:
    """x, NaN where it is not there."""
    return torch.where(is_there.view(*is_there.shape, *[1] * (x.ndim - is_there.ndim)), x, torch.nan)


class Stages:
    """The kernels' stages of one call, and the arrays of its twin as they take them."""

    def __init__(self, case: Case, x: dict[str, Tensor]):
        self.case, self.x = case, x
        kinds = (
            Kind("delta_rule", way, case.K, case.V, products_of(x["q"], x["k"], x["v"], case.C))
            for way in ("forward", "backward")
        )
        plan = Plan(case.C, {n: launch for kind in kinds for n, launch in default_plan(kind, case.C).stages.items()})
        self.device = x["q"].device
        ends = None if case.ends is None else torch.tensor(case.ends, device=self.device)
        starts = torch.tensor(case.starts, device=self.device) if case.starts else None
        names = ("q", "k", "v", "log_decay", "beta", "level_scales", "initial")
        self.call = inputs_of(Operands(*map(x.get, names)), Sequences(ends, starts, True, case.partition), SCALE, plan)
        self.parts = self.call.tiling.parts("scores_backward")

    def twin(self, dtype: torch.dtype, factors: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the result of every stage by the mathematics, NaN where a kernel may write anything."""
        twin = Twin(self.case, self.call.layout.tiers, self.x, dtype, factors or dtype)
        twin.pull(self.x["do"], self.x["dblocks"])
        self.is_token, values, d = twin.is_token, {n: y.detach() for n, y in twin.values.items()}, twin.gradients
        found = {f"d{n}": d[n] for n in ("q", "k", "v", "beta", "log_decay", "level_scales")}
        found |= {"output": values["output"], "walk dlevel_scales": d["walk scales"], "written dk": d["written keys"]}
        found = {n: where(self.is_token, y) for n, y in found.items()}

        within = {n: values[n] for n in ("inverse", "cumulative", "effective", "weights", "q_in", "q_run")}
        within |= dict(dkeys=d["keys"], dscores=d["scores"], dgram=d["gram"], dlog_state=d["state decay"])
        within |= dict(dq_in=d["q_in"], dq_run=where(~values["q_run"].isnan(), d["q_run"]))
        within |= {"key dbeta": d["key beta"], "value dbeta": d["value beta"]}
        within |= {"scores dlog_row": d["scores rows"] + d["query decay"], "scores dlog_column": -d["scores columns"]}
        within |= {"dlog_row": within["scores dlog_row"] + d["lower rows"] + d["written decay"]}
        within |= {"lower dlog_column": -d["lower columns"]}
        found |= {n: where(self.is_token.any(2), y) for n, y in within.items()} | dict(blocks=values["blocks"])
        found |= {n: lower(found[n]) for n in ("effective", "weights", "dgram")}
        found["dscores"] = lower(found["dscores"], 1)
        for s in range(len(self.call.layout.tiers)):
            arrays = ("transitions", "totals", "states", "kept", "prefixes", "prefix totals", "carried")
            found |= {f"{n} {s}": values[f"{n} {s}"] for n in arrays}
            found |= {f"d{n} {s}": d[f"{n} {s}"] for n in ("transitions", "states")}
            for n, reader in itertools.product(("kept", "prefixes", "carried"), ("read", "final", "carry")):
                if f"{n} {reader} {s}" in d:
                    found[f"d{n} {reader} {s}"] = where(~values[f"{n} {s}"].isnan(), d[f"{n} {reader} {s}"])
        for n in ("kept", "prefixes", "carried"):
            found[f"d{n} final 0"] += found[f"d{n} read 0"]
        return found | (dict(dinitial=d["initial"][:, :-1]) if self.case.starts else {})

    def kernels(self, exact: dict[str, Tensor]) -> dict[str, Tensor]:
        """The results of the kernels' stages, each from the arrays of `exact`."""
        return self.forward(exact) | self.between_backward(exact) | self.inside_backward(exact)

    def give(self, x: Tensor, dtype: torch.dtype | None = None, rows: int | None = None) -> Tensor:
        """A twin's array as a stage takes it: in the dtype of states, NaN in rows that only a packed layout has."""
        more = max(0, (rows or 0) - len(x))
        x = torch.cat([x, x.new_full((more, *x.shape[1:]), torch.nan)])
        return x.to(self.device, dtype or self.call.dtype).contiguous()

    def give_chunks(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.give(x, dtype, self.call.layout.chunks)

    def of_tokens(self, x: Tensor) -> Tensor:
        """Tokens [1, T, ...] by chunks."""
        return to_chunks(self.case, x[0].cpu())

    def saved(self, exact: dict[str, Tensor]) -> Saved:
        cumulative = self.give_chunks(exact["cumulative"] * LOG2_E, torch.float32)
        return Saved.of(self.give_chunks(exact["inverse"]), cumulative)

    def entries(self, s: int, exact: dict[str, Tensor]) -> Entries:
        rows = self.call.layout.tiers[s].entries
        transitions, states = (self.give(exact[f"{name} {s}"], rows=rows) for name in ("transitions", "states"))
        return Entries(transitions, self.totals(exact[f"totals {s}"], rows), states)

    def totals(self, x: Tensor, rows: int) -> Totals:
        return Totals(self.give(x * LOG2_E, torch.float32, rows))

    def past(self, s: int, exact: dict[str, Tensor]) -> Past:
        rows = self.call.layout.tiers[s].entries
        kept, prefixes = (self.give(exact[f"{name} {s}"], rows=rows) for name in ("kept", "prefixes"))
        totals = self.totals(exact[f"prefix totals {s}"], rows)
        carried = self.give(exact[f"carried {s}"], rows=self.call.layout.tiers[s].runs)
        return Past(kept, prefixes, totals, carried, self.call.initial)

    def dpast(self, s: int, exact: dict[str, Tensor], reader: str) -> PastGradients:
        tier = self.call.layout.tiers[s]
        rows = dict(kept=tier.entries, prefixes=tier.entries, carried=tier.runs)
        return PastGradients(*(self.give(exact[f"d{name} {reader} {s}"], rows=n) for name, n in rows.items()))

    def forward(self, exact: dict[str, Tensor]) -> dict[str, Tensor]:
        call, tiers = self.call, self.call.layout.tiers
        saved = chunk_inverse(call)
        found = dict(inverse=saved.inverse, cumulative=saved.cumulative / LOG2_E)
        own = chunk_state(call, self.saved(exact))
        found |= {"transitions 0": own.transitions, "totals 0": own.totals.heads / LOG2_E, "states 0": own.states}
        for s, tier in enumerate(tiers):
            past, ends = run_scan(call, tier, self.entries(s, exact))
            found |= {f"kept {s}": past.kept, f"prefixes {s}": past.prefixes}
            found |= {f"prefix totals {s}": past.prefix_totals.heads / LOG2_E}
            if ends is not None:
                found |= {f"transitions {s + 1}": ends.transitions, f"states {s + 1}": ends.states}
                found |= {f"totals {s + 1}": ends.totals.heads / LOG2_E}
        for s, tier in enumerate(tiers[:-1]):
            found[f"carried {s}"] = carry_in(call, tiers[s + 1], self.past(s + 1, exact), tier)
        past = self.past(0, exact)
        found |= dict(output=self.of_tokens(output(call, self.saved(exact), past)))
        return found | dict(blocks=final_blocks(call, past))

    def between_backward(self, exact: dict[str, Tensor]) -> dict[str, Tensor]:
        """The adjoints of the reads of the past, and of the tree."""
        call, tiers, do = self.call, self.call.layout.tiers, Rows.of(self.x["do"])
        q_in, dlevel_scales = self.give_chunks(exact["q_in"]), torch.zeros_like(self.x["level_scales"])
        queries = walk_backward(call, q_in, self.past(0, exact), do, Slab.of(dlevel_scales))
        found = queries._asdict() | {"walk dlevel_scales": self.of_tokens(dlevel_scales)}
        queries = Queries(*(self.give_chunks(exact[name]) for name in Queries._fields))
        dpast = past_backward(call, q_in, queries, self.past(0, exact), do)
        found |= {f"d{name} read 0": x for name, x in dpast._asdict().items()}
        dpast = self.dpast(0, exact, "read")
        final_blocks_backward(call, self.past(0, exact), self.x["dblocks"], dpast)
        found |= {f"d{name} final 0": x for name, x in dpast._asdict().items()}

        readers = ["final"] + ["carry"] * (len(tiers) - 1)  # the last ones
        dinitial = torch.zeros_like(self.x["initial"]) if self.case.starts else None
        for s in range(len(tiers)):
            dpast = self.dpast(s, exact, readers[s])
            dreads = dpast.kept if s == 0 else self.dpast(s - 1, exact, readers[s - 1]).carried
            if s > 0:
                carry = carry_in_backward(call, tiers[s], self.past(s, exact), dreads)
                found |= {f"dprefixes carry {s}": carry.prefixes, f"dcarried carry {s}": carry.carried}
            dends = None
            if s + 1 < len(tiers):
                arrays = (self.give(exact[f"d{n} {s + 1}"], rows=tiers[s].runs) for n in ("states", "transitions"))
                dends = EntryGradients(*arrays)
            tree = TierStates(tiers[s], self.entries(s, exact)._replace(states=None), self.past(s, exact))
            dentries = run_scan_backward(call, tree, dreads, dpast, dends, dinitial)
            found |= {f"d{name} {s}": x for name, x in dentries._asdict().items()}
        return found if dinitial is None else found | dict(dinitial=dinitial[:, :-1])

    def columns_of_parts(self, x: Tensor) -> Tensor:
        """[n, H, C] as shares [n, H, part, C] of which each has its own tokens."""
        part = torch.arange(self.case.C) * self.parts // self.case.C
        return torch.stack([torch.where(part == p, x, 0.0) for p in range(self.parts)], 2)

    def sum_of_parts(self, x: Tensor) -> Tensor:
        """The sum of shares [n, H, part, C], of each part with tokens, over the columns up to its last."""
        x, i, J = x.double().cpu()[: len(self.is_token)], torch.arange(self.case.C), self.case.C // self.parts
        is_there = self.is_token[:, :, ::J, None] & (i < (torch.arange(self.parts)[:, None] + 1) * J)
        return torch.where(is_there, x, 0.0).sum(2)

    def inside_backward(self, exact: dict[str, Tensor]) -> dict[str, Tensor]:
        """The adjoints of the stages inside a chunk."""
        call, case, x, do = self.call, self.case, self.x, Rows.of(self.x["do"])
        saved, H = self.saved(exact), 2 * case.G
        inside, q_in = in_chunk(call, saved)
        found = dict(effective=inside.effective, weights=inside.weights, q_in=q_in)

        def given_inside() -> Inside:
            arrays = (self.give_chunks(exact[name]) for name in ("effective", "weights"))
            return Inside(*arrays)

        def given_dinside(row: str) -> InsideGradients:
            shares = (self.columns_of_parts(exact[f"{kind} dlog_column"]) for kind in ("scores", "lower"))
            return InsideGradients(
                self.give_chunks(exact["dq_in"]),
                self.give_chunks(lower(exact["dscores"].tril())),
                self.give_chunks(exact[row], torch.float32),
                self.give_chunks(torch.stack([*shares], 2), torch.float32),
            )

        walk = exact["walk dlevel_scales"].transpose(1, 2)[self.is_token.transpose(1, 2)]
        dlevel_scales = walk.to(self.device, torch.float32).view_as(x["level_scales"])
        dq, dk = (torch.full((1, case.T, H, case.K), torch.nan, device=self.device) for _ in range(2))
        dv, dbeta, dlog_decay = (torch.empty_like(x[name]) for name in ("v", "beta", "log_decay"))
        dinside = scores_backward(
            call, saved, given_inside(), do, self.give_chunks(exact["dq_in"]), Slab.of(dq), Slab.of(dlevel_scales)
        )
        found |= dict(dq=self.of_tokens(dq), dlevel_scales=self.of_tokens(dlevel_scales), dscores=dinside.dscores)
        found |= {
            "scores dlog_row": dinside.dlog_row,
            "scores dlog_column": self.sum_of_parts(dinside.dlog_column[:, :, 0]),
        }
        dentries = EntryGradients(*(self.give_chunks(exact[f"d{name} 0"]) for name in EntryGradients._fields))
        writes = writes_backward(
            call, saved, given_inside(), given_dinside("dlog_row"), dentries, do, Slab.of(dk), Slab.of(dv)
        )
        tiles = call.tiling.key_tiles("writes_backward")
        found |= {"written dk": self.of_tokens(dk), "dv": self.of_tokens(dv), "dkeys": writes.dkeys}
        found |= {"key dbeta": writes.sums[:, :, :tiles].sum(2), "value dbeta": writes.sums[:, :, tiles:].sum(2)}
        sums = self.give_chunks(torch.zeros(*self.is_token.shape[:2], writes.sums.shape[2], case.C), torch.float32)
        sums[: len(self.is_token), :, 0] = exact["key dbeta"].to(sums)
        sums[: len(self.is_token), :, tiles] = exact["value dbeta"].to(sums)
        dinside = given_dinside("scores dlog_row")
        given = Writes(self.give_chunks(exact["dkeys"], torch.float32), sums)
        lowered = lower_backward(call, saved, given_inside(), dinside, given, Slab.of(dbeta))
        found |= dict(dgram=lowered.dlower, dlog_state=lowered.dlog_state, dbeta=self.of_tokens(dbeta))
        found |= {"dlog_row": dinside.dlog_row, "lower dlog_column": self.sum_of_parts(dinside.dlog_column[:, :, 1])}
        written = exact["written dk"].transpose(1, 2)[self.is_token.transpose(1, 2)].view_as(dk)
        dk, dinside = written.to(dk), given_dinside("dlog_row")
        given = Lower(self.give_chunks(exact["dgram"]), self.give_chunks(exact["dlog_state"], torch.float32))
        dkeys = self.give_chunks(exact["dkeys"], torch.float32)
        keys_backward(call, saved.cumulative, dinside, dkeys, given, Slab.of(dk))
        decay_backward(call, saved.cumulative, dentries.transitions, dinside, given, Slab.of(dlog_decay))
        return found | dict(dk=self.of_tokens(dk), dlog_decay=self.of_tokens(dlog_decay))

"""The delta rule's stages in plain torch, written from the mathematics, with neither tiles nor scans of their own.

One graph goes from the inputs to the output and the final blocks. Each array between two stages has a name, and so has
each use of it: a stage's adjoint returns gradients of uses, which autograd finds. An array is NaN where nobody may
read it.
"""

# H heads, n chunks, C chunk, K key, V value, L levels; i number of an entry in its run, j slot
from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loglinear.reference.dense import index_matrix_TT
from tests.kernels.gate_stages import Case

SCALE = 0.25


class Product(torch.autograd.Function):
    """a @ b of factors rounded to a dtype, as matrix units take them; in the backward too."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.dtype = dtype
        return a.to(dtype).to(a.dtype) @ b.to(dtype).to(b.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b, dy = (x.to(ctx.dtype).to(x.dtype) for x in (*ctx.saved_tensors, dy))
        return dy @ b.mT, a.mT @ dy, None


@dataclass(frozen=True)
class Run:
    """The entries start .. stop - 1 of a run; entry i is in row base + i."""

    row: int
    base: int
    start: int
    stop: int
    number: int
    sequence: int
    has_end: bool


def lengths_of(case: Case) -> list[int]:
    return [case.T] if case.ends is None else torch.tensor(case.ends).diff().tolist()


def starts_of(case: Case) -> list[int]:
    return [*(case.starts or [0] * len(lengths_of(case)))]


def entries_of_a_run(case: Case) -> int:
    """The entries of a tier that are one entry of the next: three levels with radix 2, else one digit."""
    return 8 if case.partition.radix == 2 else case.partition.radix


def blocks_of_a_run(case: Case) -> int:
    """The most blocks that the past of an entry has in its run."""
    return 3 if case.partition.radix == 2 else case.partition.radix - 1


def runs_of(case: Case, tier: int) -> list[Run]:
    """The runs of a tier, whose entries are entries**tier chunks; the unfinished chunk is the last of its sequence."""
    found: list[Run] = []
    base, entries = 0, entries_of_a_run(case)
    for sequence, (z0, length) in enumerate(zip(starts_of(case), lengths_of(case), strict=True)):
        first, last = (z // entries**tier for z in (z0, z0 + length // case.C))
        for number in range(first // entries, last // entries + 1):
            start, stop = max(first - entries * number, 0), min(last + 1 - entries * number, entries)
            row = base + entries * number - first
            found.append(Run(len(found), row, start, stop, number, sequence, number < last // entries))
        base += last - first + 1
    return found


def entries_of(case: Case, tier: int) -> Iterator[tuple[Run, int]]:
    for run in runs_of(case, tier):
        for i in range(run.start, run.stop):
            yield run, i


def members(case: Case, number: int, block: int, count: int) -> range:
    """The entries that make up one block of the past of `number` entries; the last block of `count` is all the rest."""
    radix = case.partition.radix
    size, nearer = radix ** (block // (radix - 1)), block % (radix - 1)
    blocks = number // size
    end = (blocks - min(nearer, blocks % radix)) * size
    if block == count - 1:
        return range(end)
    return range(end - size, end) if blocks % radix > nearer else range(0)


def to_chunks(case: Case, tokens: Tensor) -> Tensor:
    """[T, H, ...] as [n, H, C, ...], 0 behind the last token of a sequence; its unfinished chunk is there if empty."""
    rows, first = [], 0
    for length in lengths_of(case):
        for z in range(length // case.C + 1):
            row = tokens[first + z * case.C : first + min(length, (z + 1) * case.C)]
            rows.append(torch.cat([row, row.new_zeros(case.C - len(row), *row.shape[1:])]).transpose(0, 1))
        first += length
    return torch.stack(rows)


def fill(found: dict[Any, Tensor], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The array of that shape with an element `like` this at each place, NaN where nothing was found."""
    nothing = torch.full_like(like, torch.nan, requires_grad=False)
    places = list(itertools.product(*map(range, shape)))
    return torch.stack([found.get(place, nothing) for place in places] or [nothing])[: len(places)].unflatten(0, shape)


class Twin:
    """The arrays of a call by name: `values`, and after `pull` the `gradients` of their uses.

    tiers: of the layout, for the numbers of slots and columns. dtype: of all arrays. factors: of products."""

    def __init__(self, case: Case, tiers: Any, x: dict[str, Tensor], dtype: torch.dtype, factors: torch.dtype):
        self.case, self.tiers, self.factors = case, tiers, factors
        self.values: dict[str, Tensor] = {}
        self.cap = case.partition.num_blocks(case.L, case.C) - 1
        x = {name: value.to("cpu", dtype) for name, value in x.items()}
        heads = {name: value[0].repeat_interleave(2, 1) if name in "qk" else value[0] for name, value in x.items()}
        chunks = {name: to_chunks(case, heads[name]) for name in ("q", "k", "v", "log_decay", "beta", "level_scales")}
        self.is_token = to_chunks(case, torch.ones(case.T, 2 * case.G)) > 0
        leaves = {name: self.use(name, value.requires_grad_()) for name, value in chunks.items()}
        self.initial = self.use("initial", x["initial"].requires_grad_()) if case.starts else None
        within = self.inside(**leaves)
        self.tree(*within[2:])
        self.use("output", within[0] + self.reads(within[1], leaves["level_scales"]))
        self.use("blocks", self.final_blocks(*self.past_of(0, "final")))

    def use(self, name: str, x: Tensor) -> Tensor:
        self.values[name] = x.view_as(x)
        if x.requires_grad:
            self.values[name].retain_grad()
        return self.values[name]

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return Product.apply(a, b, self.factors)

    def pull(self, do: Tensor, dblocks: Tensor) -> None:
        """The gradients of <output, do> + <blocks, dblocks>."""
        output, blocks = self.values["output"], self.values["blocks"]
        loss = (output * to_chunks(self.case, do[0].to("cpu", output.dtype))).sum() + (
            blocks * dblocks.to(blocks)
        ).sum()
        loss.backward()
        zero = {name: torch.zeros_like(x) for name, x in self.values.items()}
        self.gradients = {name: zero[name] if x.grad is None else x.grad for name, x in self.values.items()}

    def inside(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, level_scales: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A chunk by itself: what its queries read of it, X, and its transition P = exp(Gam) I + D and its state.

        N = tril(diag(b) K K^T * dec, -1),   A = (I + N)^-1,   S = Q K^T * dec,   T = S A,   R_V = diag(b) V,
        R_K = -diag(b exp(G)) K,   X = diag(exp(G)) Q + T R_K,   D = Kd^T A R_K,   S_z = Kd^T A R_V
        """
        case, use, product = self.case, self.use, self.product
        G, q = use("cumulative", log_decay.cumsum(-1)), q * SCALE
        total = G[..., -1]

        def decay(kind: str) -> Tensor:
            rows, columns = use(f"{kind} rows", G), use(f"{kind} columns", G)
            return (rows[..., None] - columns[..., None, :]).tril().exp().tril()

        gram = use("gram", product(k, k.mT))
        lower = (use("lower beta", beta)[..., None] * gram * decay("lower")).tril(-1)
        identity = torch.eye(case.C, dtype=k.dtype).expand_as(lower)
        inverse = torch.linalg.solve_triangular(identity + lower, identity, upper=False, unitriangular=True)
        inverse = use("inverse", inverse)
        scores = use("scores", product(q, k.mT) * decay("scores"))
        effective = use("effective", product(scores, inverse))
        index = index_matrix_TT(case.C, case.L, case.partition).expand_as(effective)
        weights = use("weights", effective * use("inside scales", level_scales).gather(-1, index).tril())
        keys = -use("written keys", k) * use("written decay", G).exp()[..., None]
        erased, written = (use(f"{name} beta", beta)[..., None] * y for name, y in (("key", keys), ("value", v)))
        x = q * use("query decay", G).exp()[..., None] + product(effective, erased)
        to_end = use("keys", k * use("state decay", total[..., None] - G).exp()[..., None])
        is_whole = self.is_token[:, :, -1]
        own = (product(to_end.mT, product(inverse, y)) for y in (erased, written))
        transition, state = (torch.where(is_whole[..., None, None], y, torch.nan) for y in own)
        total = torch.where(is_whole, total, torch.nan)
        return product(weights, written), use("q_in", x), transition, total, state

    def tree(self, transitions: Tensor, totals: Tensor, states: Tensor) -> None:
        """The past of every tier's entries: in their run (kept, prefixes), and before it (carried to the run)."""
        case, entries, last = self.case, (transitions, totals, states), len(self.tiers) - 1
        for s in range(len(self.tiers)):
            names = (f"transitions {s}", f"totals {s}", f"states {s}")
            entries = self.scan(s, *(self.use(name, y) for name, y in zip(names, entries, strict=True)))
        like, top = states[0], {}
        if self.initial is not None:
            top = {(run.row, 0): self.initial[run.sequence, self.cap] for run in runs_of(case, last)}
        self.use(f"carried {last}", fill(top, (len(runs_of(case, last)), self.tiers[last].columns), like))
        for s in reversed(range(last)):
            past, columns, found = self.past_of(s + 1, "carry"), self.tiers[s].columns, {}
            for row, (run, i) in enumerate(entries_of(case, s + 1)):
                for column in range(columns):
                    if self.is_carried(s, i + entries_of_a_run(case) * run.number, column):
                        found[row, column] = self.read(s + 1, past, run, i, column)
            self.use(f"carried {s}", fill(found, (len(runs_of(case, s)), columns), like))

    def scan(self, s: int, transitions: Tensor, totals: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The past of a tier's entries in their runs, and the runs as entries of the next tier."""
        case, tier = self.case, self.tiers[s]
        identity = torch.eye(case.K, dtype=totals.dtype)
        full = identity * totals.exp()[..., None, None] + transitions

        def written(run: Run, by: range, at: int) -> Tensor:
            """The state at the start of entry `at` of what the entries `by` and the initial blocks there wrote."""
            state = torch.zeros_like(states[0])
            for j in range(tier.slots):
                own, m = members(case, run.start, j, tier.slots), tier.first_block + j
                if self.initial is not None and own and m < self.cap and {*own} <= {*by}:
                    state = state + self.initial[run.sequence, m]
            for i in range(run.start, at):
                state = self.product(full[run.base + i], state)
                state = state + states[run.base + i] if i in by else state
            return state

        kept, prefixes, prefix_totals, ends = {}, {}, {}, {}
        for run in runs_of(case, s):
            path, log_decay = identity.expand_as(full[0]), torch.zeros_like(totals[0])
            for i in range(run.start, run.stop if run.has_end else run.stop - 1):
                path, log_decay = self.product(full[run.base + i], path), log_decay + totals[run.base + i]
                own = path - identity * log_decay.exp()[..., None, None]
                if i + 1 < run.stop:
                    prefixes[run.base + i + 1,], prefix_totals[run.base + i + 1,] = own, log_decay
            if run.has_end:
                ends[run.row,] = own, log_decay, written(run, range(run.stop), run.stop)
            for i in range(run.start, run.stop):
                blocks = {j: members(case, i, j, tier.slots) for j in range(tier.slots)}
                kept |= {(run.base + i, j): written(run, by, i) for j, by in blocks.items() if by}
        self.use(f"kept {s}", fill(kept, (len(states), tier.slots), states[0]))
        self.use(f"prefixes {s}", fill(prefixes, (len(states),), transitions[0]))
        self.use(f"prefix totals {s}", fill(prefix_totals, (len(states),), totals[0]))
        runs, parts = (len(runs_of(case, s)),), ({key: end[p] for key, end in ends.items()} for p in range(3))
        likes = (transitions[0], totals[0], states[0])
        return tuple(fill(part, runs, like) for part, like in zip(parts, likes, strict=True))  # type: ignore

    def past_of(self, s: int, reader: str) -> tuple[Tensor, ...]:
        """The past of a tier, kept, F = exp(total) I + D and carried, as one reader uses it."""
        kept, prefixes, carried = (
            self.use(f"{name} {reader} {s}", self.values[f"{name} {s}"]) for name in ("kept", "prefixes", "carried")
        )
        decay = self.values[f"prefix totals {s}"].exp()[..., None, None]
        return kept, prefixes + decay * torch.eye(self.case.K, dtype=decay.dtype), carried

    def is_carried(self, s: int, number: int, column: int) -> bool:
        """Does a run of the tier read this column? The last one may be the initial state's prefix."""
        columns = self.tiers[s].columns
        has_prefix = self.initial is not None and column == columns - 1
        return column < columns and (has_prefix or len(members(self.case, number, column, columns)) > 0)

    def read(self, s: int, past: tuple[Tensor, ...], run: Run, i: int, place: int) -> Tensor | None:
        """The block at a place of an entry's past: first come the slots, then the older columns."""
        tier, (kept, prefixes, carried) = self.tiers[s], past
        older, row, found = place - tier.slots + tier.collapsed, run.base + i, None
        if place < tier.slots and members(self.case, i, place, tier.slots):
            found = kept[row, place]
        if older >= 0 and self.is_carried(s, run.number, older):
            state = carried[run.row, older]
            state = state if i == run.start else self.product(prefixes[row], state)
            found = state if found is None else found + state
        return found

    def reads(self, x: Tensor, level_scales: Tensor) -> Tensor:
        """O = sum over a chunk's blocks of diag(lambda) X Y, and of diag(lambda) X' R with X' = X F."""
        case, tier, (kept, prefixes, carried) = self.case, self.tiers[0], self.past_of(0, "read")
        scales, first = self.use("walk scales", level_scales), case.partition.first_column(case.C)
        in_run = blocks_of_a_run(case)
        places, at_run, out = list(entries_of(case, 0)), {}, []
        columns = [[c for c in range(tier.columns) if self.is_carried(0, run.number, c)] for run, _ in places]
        for z, (run, i) in enumerate(places):
            if columns[z]:
                at_run[z,] = x[z] if i == run.start else self.product(x[z], prefixes[z])
        q_run = self.use("q_run", fill(at_run, (len(places),), x[0]))
        for z, (run, i) in enumerate(places):
            found = [(x, kept[z, j], j) for j in range(tier.slots) if members(case, i, j, tier.slots)]
            found += [(q_run, carried[run.row, c], c + in_run) for c in columns[z]]
            y = torch.zeros(2 * case.G, case.C, case.V, dtype=x.dtype)
            for queries, state, level in found:
                y = y + scales[z, :, :, min(first + level, case.L - 1), None] * self.product(queries[z], state)
            out.append(y)
        return torch.stack(out)

    def final_blocks(self, *past: Tensor) -> Tensor:
        """The blocks [N, M, H, K, V] of the past of each sequence's unfinished chunk, 0 where there is none."""
        ends = {run.sequence: (run, i) for run, i in entries_of(self.case, 0)}
        found = {
            (n, m): block
            for n, (run, i) in ends.items()
            for m in range(self.cap + 1)
            if (block := self.read(0, past, run, i, m)) is not None
        }
        return fill(found, (len(ends), self.cap + 1), self.values["states 0"][0]).nan_to_num(nan=0.0)

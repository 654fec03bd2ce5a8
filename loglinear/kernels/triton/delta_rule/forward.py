"""The forward in five stages, those of `kernels.torch.delta_rule` on a tree of its own.

Stages 1 and 2 are the first step of `reference/chunked.py`, here with a matrix as the transition. Stages 3 and 4 are
its up-sweep. Stage 5 is its inside and its walk. With a diagonal gate a stage before them puts the decays inside chunks
into queries, keys and their products: to the other stages a token has no decay, and a chunk has K.

It saves its inputs, the inverses and the cumulative decays; the backward builds the states again.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from loglinear.kernels.triton.delta_rule.carry_in import carry_in
from loglinear.kernels.triton.delta_rule.chunk_inverse import chunk_inverse
from loglinear.kernels.triton.delta_rule.chunk_state import chunk_state
from loglinear.kernels.triton.delta_rule.final_blocks import final_blocks
from loglinear.kernels.triton.delta_rule.layout import count_chunks, layout, tree_of
from loglinear.kernels.triton.delta_rule.output import output
from loglinear.kernels.triton.delta_rule.products import choose_chunk_size, math_of, products_of, state_dtype
from loglinear.kernels.triton.delta_rule.run_scan import run_scan
from loglinear.kernels.triton.delta_rule.states import Entries, Inputs, Saved, TierStates
from loglinear.kernels.triton.diagonal_gate.decayed_rows import decayed_rows, room
from loglinear.kernels.triton.inputs import Operands, Results, Sequences, slabs
from loglinear.kernels.triton.launches import Kind, Plan, choose
from loglinear.partition import Partition

PAST_BYTES = 2 << 30  # of the states that a forward keeps at once, at least; for long inputs 1.5 times them


def plan_of(direction: str, x: Operands, chunk_size: int | None) -> Plan:
    """The plan of a call; a state prescribes its chunk size, else the dtype of the products and the gate."""
    C = choose_chunk_size(x.q, x.k, x.v, x.is_diagonal, chunk_size or 0)
    kind = Kind(
        "diagonal_delta_rule" if x.is_diagonal else "delta_rule",
        direction,
        x.q.shape[3],
        x.v.shape[3],
        products_of(x.q, x.k, x.v, C),
    )
    return choose(kind, x.q.shape[1], x.v.device, C)


def forward_slabs(x: Operands, sequences: Sequences, plan: Plan) -> list[slice]:
    """Ranges of heads, so that the past of the chunks stays small. It is up to r - 1 states a chunk with radix r.

    Radix 2 has at most three, and all heads at once; but rows that have decayed count too.
    """
    rows, tokens, _, K = x.q.shape
    (H, V), C, partition = x.v.shape[2:], plan.chunk_size, sequences.partition
    if partition.radix == 2 and not x.is_diagonal:
        return [slice(0, H)]
    packed = None if sequences.cu_seqlens is None else len(sequences.cu_seqlens) - 1
    chunks = count_chunks(rows, tokens, C, packed, sequences.final)
    numbers = K * K + (count_slots(x, C, partition) + 2) * K * V + row_numbers(x, C)
    return head_slabs(x, chunks, C, numbers, limit_of(PAST_BYTES, x.q, x.k, x.v))


def row_numbers(x: Operands, chunk_size: int) -> int:
    """The numbers of a chunk's rows that have decayed, and of their products in float32, of one head."""
    return chunk_size * (3 * x.q.shape[3] + 4 * chunk_size) if x.is_diagonal else 0


def count_slots(x: Operands, chunk_size: int, partition: Partition) -> int:
    """The most blocks of its past that a chunk reads inside its run."""
    return min(tree_of(partition, chunk_size).run_read, partition.num_blocks(x.level_scales.shape[3], chunk_size))


def limit_of(least: int, *inputs: Tensor) -> int:
    """Bytes that a call may hold at once: 1.5 times its inputs, at least so many."""
    return max(least, 3 * sum(y.numel() * y.element_size() for y in inputs) // 2)


def head_slabs(x: Operands, chunks: int, chunk_size: int, numbers: int, limit: int) -> list[slice]:
    """Ranges of heads of which the arrays of chunks, so many numbers each, stay below the limit."""
    state_bytes = numbers * state_dtype(x.q, x.k, x.v, chunk_size).itemsize
    return slabs(chunks, x.q.shape[2], x.v.shape[2], state_bytes, limit)


def inputs_of(x: Operands, sequences: Sequences, scale: float, plan: Plan) -> Inputs:
    y = layout(*x.q.shape[:2], plan.chunk_size, x.level_scales.shape[3], *sequences)
    return Inputs.of(x, y, scale, plan, products_of(x.q, x.k, x.v, plan.chunk_size))


def with_decays(x: Inputs) -> Inputs:
    """The call of a scalar gate's stages: of a diagonal one every head has its own queries and keys, which have decayed
    and are scaled."""
    if not x.is_diagonal:
        return x
    decayed = room(x, x.empty(x.layout.chunks, x.heads, x.key_dim), delta=True)
    decayed_rows(x, decayed, x.scale, math_of("decayed_rows", x.math), x.plan["decayed_rows"])
    assert decayed.seen is not None
    return replace(x, q=decayed.q, k=decayed.seen, sizes=x.sizes._replace(R=1), scale=1.0, decayed=decayed)


def build_tree(x: Inputs, saved: Saved) -> list[TierStates]:
    """Each tier with its entries, from the chunks up, and the past that they read."""
    entries: Entries | None = chunk_state(x, saved)  # 2. each chunk's own transition and state
    tree = []
    for tier in x.layout.tiers:  # 3. the past inside the runs, tier after tier: a run is an entry of the next one
        assert entries is not None
        past, ends = run_scan(x, tier, entries)
        tree.append(TierStates(tier, entries._replace(states=None), past))
        entries = ends
    if x.initial is not None:
        prefix = x.initial[:, -1:].contiguous()
        tree[-1] = tree[-1]._replace(past=tree[-1].past._replace(carried=prefix))
    for s in reversed(range(len(tree) - 1)):  # 4. the past before the runs, from the last tier down to the chunks
        carried = carry_in(x, tree[s + 1].tier, tree[s + 1].past, tree[s].tier)
        tree[s] = tree[s]._replace(past=tree[s].past._replace(carried=carried))
    return tree


def forward(x: Inputs, *, final: bool) -> Results:
    """The output [B,T,H,V], with `final` also the blocks [N,M,H,K,V] that each sequence leaves, and what is saved."""
    x = with_decays(x)
    saved = chunk_inverse(x)  # 1. each chunk's inverse
    chunks = build_tree(x, saved)[0].past
    out = output(x, saved, chunks)  # 5. inside the chunk, and the reads of the past
    return Results(out, final_blocks(x, chunks) if final else None, saved.inverse, saved.cumulative)

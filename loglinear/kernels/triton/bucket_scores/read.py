"""The scores of a chunk's queries: of the blocks before it, and of the blocks inside it.

    score(t, l) = (q_t^T M_l q_t) / |q_t|^2
    score(t, c) = sum over the keys s of column c of ((q_t . k_s)^2 / (|q_t| |k_s|)^2 - 1 / K)

M_l is stored without n_l / K I, which fits queries of length 1. For shorter queries `shortfalls` gives the rest that is
taken off: all of n_l / K for a query of length 0.
"""

# C chunk, G groups, K key, L columns
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import SIZES, Sizes, Slab
from loglinear.kernels.triton.bucket_scores.inputs import Inputs
from loglinear.kernels.triton.bucket_scores.lengths import first_of, inverse_squares, shortfalls, tokens_from
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import Launch
from loglinear.kernels.triton.levels import columns_between, store_sums
from loglinear.kernels.triton.scalar_gate.states import States
from loglinear.kernels.triton.tiles import head_program, load_rows, load_state, locate, part_of, rows_at, slab_at
from loglinear.kernels.triton.walks import after, candidate_at, height_of, slot_pointer, start_of_walk, walk


@launcher
@triton.jit(do_not_specialize=SIZES)
def read_kernel(
    q,
    k,
    states,
    scores,
    first,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    K: tl.constexpr,
    C: tl.constexpr,
    HALVES: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    UNIT: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One half of a chunk, one group: the columns that its tokens read. Others stay 0, and so does column 0."""
    sizes = Sizes(T, N, H, R, L, cap)
    TILES: tl.constexpr = (K + BV - 1) // BV
    ROWS: tl.constexpr = C // HALVES
    COLUMNS: tl.constexpr = TREE.column  # of the chunk itself
    _, h, part = head_program(1, sizes.H)
    half = part % HALVES
    chunk = part_of(locate((part // HALVES).to(tl.int64), table, sizes, C), half, ROWS)
    n = chunk.n
    if n <= 0:
        return
    i, to = tl.arange(0, ROWS), slab_at(scores, chunk, sizes, h, L)
    q_rows = rows_at(q, chunk, h)
    q_CK = load_rows(q_rows, q.t, n, 0, ROWS, K, BK)
    inverse = inverse_squares(q_CK, UNIT)
    shortfall = shortfalls(q_CK, inverse, UNIT) / K
    read, end_of_blocks, are_initial = walk(chunk, cap, TREE)
    stand, older = start_of_walk(read, chunk, TREE), chunk.z  # chunks of the last column
    begun = first_of(first, chunk)
    in_last = tl.zeros([ROWS], tl.float32)
    for _ in range(tl.sum(read.to(tl.int32), 0)):
        l = candidate_at(stand, chunk, TREE)
        stand = after(stand, TREE)
        pointer = slot_pointer(states, chunk, l, sizes, h, K * K, TREE)
        found = tl.zeros([ROWS], tl.float32)
        for tile in (tl.static_range if TILES <= 2 else tl.range)(TILES):
            sum_KV = load_state(pointer, tile * BV, K, K, BK, BV)
            pulled_CV = tl.dot(q_CK.to(MATH.dot), sum_KV, input_precision=MATH.precision)
            if TILES == 1:
                found += tl.sum(pulled_CV * q_CK.to(tl.float32), 1)
            else:
                q_CV = load_rows(q_rows, q.t, n, tile * BV, ROWS, K, BV, l)
                found += tl.sum(pulled_CV * q_CV.to(tl.float32), 1)
        found *= inverse
        chunks = tl.where(l < cap, 1 << height_of(l, TREE), 0)
        older -= chunks
        in_last += tl.where(l < cap, 0.0, found)
        own = found - shortfall * tokens_from(begun, older, older + chunks, C)
        tl.store(to + i * scores.t + COLUMNS + l, own, mask=i < tl.where(l < cap, n, 0))
    in_last -= shortfall * tokens_from(begun, older * 0, older, C)
    if COLUMNS > 1:
        k_CK = load_rows(rows_at(k, chunk, h), k.t, n, 0, ROWS, K, BK)
        matches_CC = tl.dot(q_CK.to(MATH.dot), tl.trans(k_CK.to(MATH.dot)), input_precision=MATH.precision)
        matches_CC = matches_CC * matches_CC * inverse[:, None] * inverse_squares(k_CK, UNIT)[None, :] - 1 / K
        is_read = (columns_between(i, ROWS, TREE) > 0) & (i[None, :] < i[:, None])
        matches_CC = tl.where(is_read, matches_CC, 0.0)
        to_last = tl.where(L <= COLUMNS, in_last, 0.0)
        store_sums(to, scores.t, tl.where(L > 1, n, 0), L, matches_CC, 1.0, to_last, i, ROWS, COLUMNS, TREE)
    tl.store(to + i * scores.t + L - 1, in_last, mask=i < tl.where(L > COLUMNS, n, 0))


def read(x: Inputs, states: States, scores: Tensor, launch: Launch) -> None:
    """Write the scores [B,T,G,L] of these groups; they come in as 0."""
    read_kernel[(x.layout.chunks * x.halves * x.groups,)](
        x.q,
        x.k,
        states,
        Slab.of(scores),
        x.first,
        x.layout.table,
        *x.sizes,
        HALVES=x.halves,
        TREE=x.tree,
        **x.row_constants(launch),
    )

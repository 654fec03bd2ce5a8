"""The reads of a chunk's queries: their own chunk, the blocks of their run, and the past carried to the run.

E  = (Q K^T * dec) Ab            O = (E * LAM) V
X  = diag(exp(G)) Q - E diag(exp(G)) K
from the second half of a chunk to the first, E' = X diag(exp(Gam - G')) K'^T Ab':
                                 O += diag(lambda) E' V',         X <- exp(Gam) X - E' diag(exp(G')) K'
for each older state of the run: O += diag(lambda) X Y[slot]
for each carried state:          O += diag(lambda) X' R[column],  X' = X F
"""

# C chunk, J a half of it (or all of it), H heads, K key, V value, L levels
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import Sizes
from loglinear.kernels.triton.compiler import prefetched
from loglinear.kernels.triton.delta_rule.reads import columns_read, count_reads, first_column, first_slot, slots_read
from loglinear.kernels.triton.delta_rule.states import SIZES, Inputs, Past, Saved
from loglinear.kernels.triton.delta_rule.tiles import (
    chunk_scales,
    column_decays,
    decay,
    head_rows,
    inverse_at,
    load_decays,
    load_strength,
    load_tile,
    place_in_run,
    row_products,
    rows_from,
)
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.levels import load_scale
from loglinear.kernels.triton.tiles import head_program, load_block, load_rows, locate, part_of, store_rows
from loglinear.kernels.triton.walks import after


@triton.jit
def minus_keys(x, across, weights_JJ, keys, n, K: tl.constexpr, J: tl.constexpr, TK: tl.constexpr, MATH: tl.constexpr):
    """X across - weights K, in tiles of TK columns."""
    new = ()
    for t in tl.static_range((K + TK - 1) // TK):
        k_JT = load_rows(keys.data, keys.t, n, t * TK, J, K, TK).to(weights_JJ.dtype)
        x_JT = x[t].to(tl.float32) * across - tl.dot(weights_JJ, k_JT, input_precision=MATH.precision)
        new = new + (x_JT.to(weights_JJ.dtype),)
    return new


@triton.jit
def through_state(
    x, state, tile, K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr, MATH: tl.constexpr
):
    """X S, one tile of V."""
    y_JV = tl.dot(x[0], load_block(state, 0, tile * BV, K, V, TK, BV), input_precision=MATH.precision)
    for t in tl.static_range(1, (K + TK - 1) // TK):
        y_JV = tl.dot(x[t], load_block(state, t * TK, tile * BV, K, V, TK, BV), y_JV, input_precision=MATH.precision)
    return y_JV


@triton.jit
def through_prefix(x, past, entry, K: tl.constexpr, TK: tl.constexpr, MATH: tl.constexpr):
    """X F of the entry in this row."""
    prefix, new = past.prefixes + entry * (K * K), ()
    for j in tl.static_range((K + TK - 1) // TK):
        y_JT = x[j].to(tl.float32) * tl.exp2(column_decays(past.prefix_totals, entry, j * TK, K, TK))
        for t in tl.static_range((K + TK - 1) // TK):
            y_JT = tl.dot(x[t], load_block(prefix, t * TK, j * TK, K, K, TK, TK), y_JT, input_precision=MATH.precision)
        new = new + (y_JT.to(MATH.dot),)
    return new


@launcher
@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    q,
    k,
    v,
    beta,
    level_scales,
    saved,
    past,
    out,
    table,
    first_runs,
    T,
    N,
    H,
    R,
    L,
    cap,
    scale,
    num_slots,
    columns,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    J: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    LINEAR: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One half of a chunk, one head, one tile of V."""
    sizes = Sizes(T, N, H, R, L, cap)
    TILES: tl.constexpr = (V + BV - 1) // BV
    HALVES: tl.constexpr = C // J
    DTYPE: tl.constexpr = level_scales.data.dtype.element_ty
    tile, h, number = head_program(TILES, H)
    half = number % HALVES
    chunk = part_of(locate((number // HALVES).to(tl.int64), table, sizes, C), half, J)
    n = chunk.n
    if n <= 0:
        return
    i, row = tl.arange(0, J), chunk.c * H + h
    q_rows, k_rows = head_rows(q, chunk, h // sizes.R), head_rows(k, chunk, h // sizes.R)
    strengths, scales = head_rows(beta, chunk, h), head_rows(level_scales, chunk, h)
    cumulative = saved.cumulative + row * C
    G = tl.load(cumulative + half * J + i)
    if half > 0:
        G -= tl.load(cumulative + J - 1)
    if saved.scores is not None:
        scores_JJ = load_tile(saved.scores + row * (C * C), 0, 0, C, J)
    else:
        scores_JJ = row_products(q_rows, k_rows, n, n, K, J, J, TK, MATH)
    scores_JJ = (scores_JJ * (decay(G, G, i, J) * scale)).to(MATH.dot)
    inverse_JJ = load_tile(inverse_at(saved, chunk, h, C), half * J, half * J, C, J)
    effective_JJ = tl.dot(scores_JJ, inverse_JJ, input_precision=MATH.precision)
    effective_JJ *= load_strength(strengths, n, J)[None, :]
    x = ()
    for t in tl.static_range(0, K, TK):
        x = x + (load_rows(q_rows.data, q_rows.t, n, t, J, K, TK),)
    from_start, weights_JJ = tl.exp2(G), (effective_JJ * tl.exp2(G)[None, :]).to(MATH.dot)
    x = minus_keys(x, from_start[:, None] * scale, weights_JJ, k_rows, n, K, J, TK, MATH)
    effective_JJ *= chunk_scales(scales, n, L, i, DTYPE, J, LINEAR, TREE, MATH)
    v_rows = head_rows(v, chunk, h)
    v_JV = load_rows(v_rows.data, v_rows.t, n, tile * BV, J, V, BV).to(MATH.dot)
    out_JV = tl.dot(effective_JJ.to(MATH.dot), v_JV, input_precision=MATH.precision)
    if half > 0:
        G, total = load_decays(cumulative, J)
        k_first = rows_from(k_rows, -J)
        scores_JJ = tl.zeros([J, J], tl.float32)
        for t in tl.static_range((K + TK - 1) // TK):
            k_JT = load_rows(k_first.data, k_first.t, J, t * TK, J, K, TK).to(MATH.dot)
            scores_JJ = tl.dot(x[t], tl.trans(k_JT), scores_JJ, input_precision=MATH.precision)
        scores_JJ = (scores_JJ * tl.exp2(total - G)[None, :]).to(MATH.dot)
        inverse_JJ = load_tile(inverse_at(saved, chunk, h, C), 0, 0, C, J)
        effective_JJ = tl.dot(scores_JJ, inverse_JJ, input_precision=MATH.precision)
        effective_JJ *= load_strength(rows_from(strengths, -J), J, J)[None, :]
        weight = prefetched(load_scale(scales.data, scales.t, n, TREE.column - 1, L, i), DTYPE)
        v_first = rows_from(v_rows, -J)
        v_JV = load_rows(v_first.data, v_first.t, J, tile * BV, J, V, BV).to(MATH.dot)
        out_JV = tl.dot((effective_JJ * weight[:, None]).to(MATH.dot), v_JV, out_JV, input_precision=MATH.precision)
        weights_JJ = (effective_JJ * tl.exp2(G)[None, :]).to(MATH.dot)
        x = minus_keys(x, tl.exp2(total), weights_JJ, k_first, J, K, J, TK, MATH)

    place = place_in_run(chunk, first_runs, N, TREE)
    reads = slots_read(place.i, num_slots, TREE)
    kept = past.kept + (chunk.c * num_slots * H + h) * (K * V)
    for _ in range(count_reads(reads, TREE)):
        slot = first_slot(reads, TREE)
        reads = after(reads, TREE)
        weight = prefetched(load_scale(scales.data, scales.t, n, slot + TREE.column, L, i), DTYPE)
        out_JV += weight[:, None] * through_state(x, kept + slot.to(tl.int64) * H * (K * V), tile, K, V, TK, BV, MATH)
    reads = columns_read(place.number, columns, past.initial, TREE)
    if (reads > 0) & (place.i > place.start):
        x = through_prefix(x, past, row, K, TK, MATH)
    carried = past.carried + (place.run * columns * H + h) * (K * V)
    for _ in range(count_reads(reads, TREE)):
        column = first_column(reads, columns, TREE)
        reads = after(reads, TREE)
        weight = prefetched(load_scale(scales.data, scales.t, n, column + (TREE.column + TREE.run_read), L, i), DTYPE)
        state = carried + column.to(tl.int64) * H * (K * V)
        out_JV += weight[:, None] * through_state(x, state, tile, K, V, TK, BV, MATH)
    rows = out + ((chunk.b * sizes.T + chunk.first) * H + h) * V
    store_rows(rows, H * V, n, tile * BV, out_JV, J, V, BV)


def output(x: Inputs, saved: Saved, past: Past) -> Tensor:
    """[B, T, H, V] in v's dtype. past: of the chunks."""
    y, v, parts = x.layout, x.v.data, x.tiling.parts("output")
    out = x.empty(*v.shape, dtype=v.dtype)
    output_kernel[(y.chunks * parts * x.heads * x.tiling.tiles("output"),)](
        x.q,
        x.k,
        x.v,
        x.beta,
        x.level_scales,
        saved,
        past,
        out,
        y.table,
        y.first_runs,
        *x.sizes,
        x.scale,
        y.tiers[0].slots,
        y.tiers[0].columns,
        C=x.chunk_size,
        J=x.chunk_size // parts,
        LINEAR=x.sizes.L == 1,
        TREE=x.tree,
        **x.constants("output"),
    )
    return out

"""The inside of a chunk, differentiated: the queries' side, in rows of the chunk.

    S = Q K^T * dec,   T = S A,   O = (T * LAM) diag(b) V,   X = diag(exp(G)) Q - T diag(b exp(G)) K

    dT = (dO V^T * LAM - dX K^T diag(exp(G))) diag(b),   dS = dT A^T,   dQ = (dS * dec) K + diag(exp(G)) dX

A chunk of 128 is two parts of 64 tokens; tiles above the diagonal are neither computed nor read. With a diagonal gate
this stage ends with dS: `decayed_rows_backward` makes dQ of dS and dX.
"""

# C chunk, J tokens of a part, H heads, K key, V value, L levels
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import Rows, Sizes, Slab
from loglinear.kernels.triton.compiler import prefetched
from loglinear.kernels.triton.delta_rule.in_chunk import is_level, own_scales
from loglinear.kernels.triton.delta_rule.states import SIZES, Inputs, Inside, InsideGradients, Saved
from loglinear.kernels.triton.delta_rule.tiles import (
    HeadRows,
    decay,
    head_rows,
    inverse_at,
    load_strength,
    load_tile,
    load_tokens,
    multiply_rows,
    part_of_head,
    rows_from,
)
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.levels import load_scale, store_sums
from loglinear.kernels.triton.tiles import load_rows, slab_at, store_block, store_rows


class Scores(NamedTuple):
    """A part of n tokens, in a chunk of n_keys. Keys, values, beta and matrices begin with the chunk, and so do G and
    the rows' and columns' shares of the decays' gradient; all others begin with the part."""

    n: tl.tensor
    n_keys: tl.tensor
    k: HeadRows
    v: HeadRows
    q: HeadRows
    do: HeadRows
    beta: HeadRows
    scales: HeadRows
    dq: HeadRows
    dscales: HeadRows
    inverse: tl.tensor
    effective: tl.tensor
    dscores: tl.tensor
    dq_in: HeadRows
    G: tl.tensor
    dlog_row: tl.tensor
    dlog_column: tl.tensor


@triton.jit
def sums_by_level(x_JJ, last, J: tl.constexpr, COLUMNS: tl.constexpr, TREE: tl.constexpr):
    """Sums of x over the columns of each level [J, level], those from the last on in its column. (A choice for each
    level and place: triton 3.6 makes wrong code of products with indicators of the levels where registers are few.)"""
    column, sums_JL = tl.arange(0, 16)[None, :], tl.zeros([J, 16], tl.float32)
    for level in tl.static_range(COLUMNS):
        total = tl.sum(tl.where(is_level(tl.arange(0, J), level, J, TREE), x_JJ, 0.0), 1)
        sums_JL += tl.where(column == tl.minimum(level, last), total[:, None], 0.0)
    return sums_JL


@triton.jit
def store_dscales(
    x,
    dscales_JJ,
    across,
    L,
    J: tl.constexpr,
    COLUMNS: tl.constexpr,
    LINEAR: tl.constexpr,
    TREE: tl.constexpr,
):
    """dlambda of the chunk's own columns, of which the last one takes `across`. The walk has stored what it gives to a
    last column that the chunk shares."""
    last, i = L - 1, tl.arange(0, J)
    LAST: tl.constexpr = TREE.column - 1
    if TREE.radix_log > 1 and not LINEAR:
        to, stride = x.dscales.data, x.dscales.t
        to_last = across + tl.load(to + (i * stride + last), mask=(i < x.n) & (last <= LAST), other=0.0).to(tl.float32)
        store_sums(to, stride, x.n, L, dscales_JJ, 1.0, to_last, i, J, COLUMNS, TREE)
    else:
        column, inside = tl.arange(0, 1 if LINEAR else 16)[None, :], (i < x.n)[:, None]
        to = x.dscales.data + (i * x.dscales.t)[:, None] + column
        sums_JL = tl.sum(dscales_JJ, 1)[:, None] if LINEAR else sums_by_level(dscales_JJ, last, J, COLUMNS, TREE)
        sums_JL += tl.where(column == tl.minimum(last, LAST), across[:, None], 0.0)
        sums_JL += tl.load(to, mask=inside & (column == last) & (last <= LAST), other=0.0).to(tl.float32)
        tl.store(to, sums_JL.to(to.dtype.element_ty), mask=inside & (column <= tl.minimum(last, LAST)))


@triton.jit
def scores_part(
    x,
    L,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    J: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    EARLIER: tl.constexpr,
    DECAYED: tl.constexpr,
    LINEAR: tl.constexpr,
    DTYPE: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """The rows of one part, `Scores`. EARLIER: there is one before it, which it reads in the last column. DECAYED: the
    queries and keys are those of a diagonal gate."""
    COLUMNS: tl.constexpr = TREE.column - EARLIER if TREE.column > 1 else 1
    own: tl.constexpr = J if EARLIER else 0
    i, n = tl.arange(0, J), x.n
    k_own, v_own = rows_from(x.k, own), rows_from(x.v, own)
    G_own, n_first = load_tokens(x.G, own, J), tl.minimum(x.n_keys, J)
    across, dlog_row = tl.zeros([J], tl.float32), tl.zeros([J], tl.float32)
    dscores_own = tl.zeros([J, J], tl.float32)
    if EARLIER:  # all of the earlier part is read at one level
        G_first, strength = load_tokens(x.G, 0, J), load_strength(x.beta, n_first, J)
        pulled_JJ = multiply_rows(x.do, x.v, n, n_first, V, J, BV, MATH)
        pulled_JJ *= strength[None, :]
        across = tl.sum(pulled_JJ * load_tile(x.effective, own, 0, C, J).to(tl.float32), 1)
        pulled_JJ *= prefetched(load_scale(x.scales.data, x.scales.t, n, TREE.column - 1, L, i), DTYPE)[:, None]
        read_JJ = multiply_rows(x.dq_in, x.k, n, n_first, K, J, TK, MATH)
        deffective_JJ = (pulled_JJ - read_JJ * (strength * tl.exp2(G_first))[None, :]).to(MATH.dot)
        inverse_JJ = tl.trans(load_tile(x.inverse, own, 0, C, J))
        dscores_own = tl.dot(deffective_JJ, inverse_JJ, dscores_own, input_precision=MATH.precision)
        inverse_JJ = tl.trans(load_tile(x.inverse, 0, 0, C, J))
        dscores_JJ = tl.dot(deffective_JJ, inverse_JJ, input_precision=MATH.precision)
        store_block(x.dscores, own, 0, dscores_JJ, C, C, J, J)
        dlog_JJ = dscores_JJ * (tl.exp2(G_own[:, None] - G_first[None, :]) * scale)
        dlog_JJ *= multiply_rows(x.q, x.k, n, n_first, K, J, TK, MATH)
        tl.store(x.dlog_column + i, tl.sum(dlog_JJ, 0))
        dlog_row += tl.sum(dlog_JJ, 1)

    strength = load_strength(rows_from(x.beta, own), n, J)
    pulled_JJ = multiply_rows(x.do, v_own, n, n, V, J, BV, MATH) * strength[None, :]
    dscales_JJ = pulled_JJ * load_tile(x.effective, own, own, C, J).to(tl.float32)
    store_dscales(x, dscales_JJ, across, L, J, COLUMNS, LINEAR, TREE)
    # Columns j > i of dT are not 0 here; dS takes no part of them to j <= i.
    pulled_JJ *= own_scales(x.scales, n, L, J, COLUMNS, LINEAR, DTYPE, TREE)
    pulled_JJ = tl.where(i[:, None] >= i[None, :], pulled_JJ, 0.0)
    read_JJ = multiply_rows(x.dq_in, k_own, n, n, K, J, TK, MATH)
    deffective_JJ = (pulled_JJ - read_JJ * (strength * tl.exp2(G_own))[None, :]).to(MATH.dot)
    inverse_JJ = tl.trans(load_tile(x.inverse, own, own, C, J))
    dscores_own = tl.dot(deffective_JJ, inverse_JJ, dscores_own, input_precision=MATH.precision)
    store_block(x.dscores, own, own, dscores_own, C, C, J, J)
    if not DECAYED:
        dlog_JJ = dscores_own * (decay(G_own, G_own, i, J) * scale)
        dlog_JJ *= multiply_rows(x.q, k_own, n, n, K, J, TK, MATH)
        tl.store(x.dlog_column + own + i, tl.sum(dlog_JJ, 0))
        queries_part(x, dlog_row + tl.sum(dlog_JJ, 1), scale, K, C, J, TK, EARLIER, MATH)


@triton.jit
def queries_part(
    x,
    dlog_row,
    scale,
    K: tl.constexpr,
    C: tl.constexpr,
    J: tl.constexpr,
    TK: tl.constexpr,
    EARLIER: tl.constexpr,
    MATH: tl.constexpr,
):
    """dQ of the rows of one part, from its dS; and the rows' share of the decays' gradient."""
    own: tl.constexpr = J if EARLIER else 0
    i, n, k_own, n_first = tl.arange(0, J), x.n, rows_from(x.k, own), tl.minimum(x.n_keys, J)
    G_own = load_tokens(x.G, own, J)
    tl.debug_barrier()  # dS as it was stored
    dscores_own = load_tile(x.dscores, own, own, C, J).to(tl.float32) * (decay(G_own, G_own, i, J) * scale)
    dscores_own = dscores_own.to(MATH.dot)
    if EARLIER:
        G_first = load_tokens(x.G, 0, J)
        dscores_first = load_tile(x.dscores, own, 0, C, J).to(tl.float32)
        dscores_first = (dscores_first * (tl.exp2(G_own[:, None] - G_first[None, :]) * scale)).to(MATH.dot)
    for t in range(0, K, TK):
        dq_JT = load_rows(x.dq_in.data, x.dq_in.t, n, t, J, K, TK).to(tl.float32) * (tl.exp2(G_own) * scale)[:, None]
        dlog_row += tl.sum(dq_JT * load_rows(x.q.data, x.q.t, n, t, J, K, TK).to(tl.float32), 1)
        k_JT = load_rows(k_own.data, k_own.t, n, t, J, K, TK).to(MATH.dot)
        dq_JT = tl.dot(dscores_own, k_JT, dq_JT, input_precision=MATH.precision)
        if EARLIER:
            k_JT = load_rows(x.k.data, x.k.t, n_first, t, J, K, TK).to(MATH.dot)
            dq_JT = tl.dot(dscores_first, k_JT, dq_JT, input_precision=MATH.precision)
        store_rows(x.dq.data, x.dq.t, n, t, dq_JT, J, K, TK)
    tl.store(x.dlog_row + own + i, dlog_row)


@launcher
@triton.jit(do_not_specialize=SIZES)
def scores_backward_kernel(
    q,
    k,
    v,
    beta,
    level_scales,
    saved,
    inside,
    do,
    dinside,
    dq,
    dlevel_scales,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    LINEAR: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """C / PARTS rows of one chunk, one head: dq [B, T, H, K]; dS; the chunk's own columns of dlevel_scales, adding to
    the last one where the walk shares it; and of the decays' gradient the rows' share, and the columns' of S. Without
    dq, whose queries have decayed: dS and dlevel_scales."""
    sizes = Sizes(T, N, H, R, L, cap)
    DTYPE: tl.constexpr = level_scales.data.dtype.element_ty
    J: tl.constexpr = C // PARTS
    DECAYED: tl.constexpr = dq is None
    part = part_of_head(table, sizes, C, PARTS)
    chunk, own, h = part.whole, part.own, part.h
    if chunk.n <= 0:
        return
    row, group = chunk.c * sizes.H + h, h // sizes.R
    dq_in = HeadRows(dinside.dq_in + (row * C + part.first) * K, K)
    x = Scores(
        own.n,
        chunk.n,
        head_rows(k, chunk, group),
        head_rows(v, chunk, h),
        head_rows(q, own, group),
        head_rows(do, own, h),
        head_rows(beta, chunk, h),
        head_rows(level_scales, own, h),
        dq_in if DECAYED else HeadRows(slab_at(dq, own, sizes, h, K), dq.t),
        HeadRows(slab_at(dlevel_scales, own, sizes, h, L), dlevel_scales.t),
        inverse_at(saved, chunk, h, C),
        inside.effective + row * (C * C),
        dinside.dscores + row * (C * C),
        dq_in,
        saved.cumulative + row * C,
        dinside.dlog_row + row * C,
        dinside.dlog_column + (row * (2 * PARTS) + part.part) * C,
    )
    if part.first == 0:
        scores_part(x, L, scale, K, V, C, J, TK, BV, False, DECAYED, LINEAR, DTYPE, TREE, MATH)
    elif PARTS > 1:
        scores_part(x, L, scale, K, V, C, J, TK, BV, True, False, LINEAR, DTYPE, TREE, MATH)


def scores_backward(
    x: Inputs, saved: Saved, inside: Inside, do: Rows, dq_in: Tensor, dq: Slab | None, dlevel_scales: Slab
) -> InsideGradients:
    """Write dq (of a scalar gate), complete dlambda, and return the queries' side."""
    chunks, H, C, parts = x.layout.chunks, x.heads, x.chunk_size, x.tiling.parts("scores_backward")
    dlog_row, dlog_column = x.empty(chunks, H, C), x.empty(chunks, H, 2, parts, C)
    dinside = InsideGradients(dq_in, torch.empty_like(inside.effective), dlog_row, dlog_column)
    scores_backward_kernel[(chunks * parts * H,)](
        x.q,
        x.k,
        x.v,
        x.beta,
        x.level_scales,
        saved,
        inside,
        do,
        dinside,
        dq,
        dlevel_scales,
        x.layout.table,
        *x.sizes,
        x.scale,
        C=C,
        PARTS=parts,
        LINEAR=x.sizes.L == 1,
        TREE=x.tree,
        **x.constants("scores_backward"),
    )
    return dinside

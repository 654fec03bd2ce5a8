"""The forward's inside of a chunk, computed once more for its adjoint.

    S = Q K^T * dec,   T = S A,   T * LAM,   X = diag(exp(G)) Q + T R_K,   R_K = -diag(b exp(G)) K

A chunk of 128 is two parts of 64 tokens. S, T and A are lower triangular: the first part's rows have one tile of 64
columns, the second's have two, its own and the earlier part's. Above the diagonal nothing is written, nor read.
With a diagonal gate Q and K have decayed, S is there, and a chunk is one part.
"""

# C chunk, J tokens of a part, H heads, K key, L levels
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import Sizes
from loglinear.kernels.triton.compiler import prefetched
from loglinear.kernels.triton.delta_rule.states import SIZES, Inputs, Inside, Saved
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
from loglinear.kernels.triton.levels import gather_scales, load_scale
from loglinear.kernels.triton.tiles import load_rows, store_block


class InChunk(NamedTuple):
    """A part of n tokens, in a chunk of n_keys. Queries and lambda begin with the part, all others with the chunk."""

    n: tl.tensor
    n_keys: tl.tensor
    q: HeadRows
    k: HeadRows
    beta: HeadRows
    scales: HeadRows
    inverse: tl.tensor
    G: tl.tensor
    effective: tl.tensor
    weights: tl.tensor
    q_in: tl.tensor


@triton.jit
def is_level(i, level: tl.constexpr, J: tl.constexpr, TREE: tl.constexpr):
    """[i, j]: is level(i, j) = level, of a part's own tokens? With radix 2 alone."""
    i, j = i[:, None], tl.arange(0, J)[None, :]
    if TREE.finest_log > 0:
        i, j = i >> TREE.finest_log, j >> TREE.finest_log
    if level == 0:
        return i == j
    else:
        return ((i >> level) == (j >> level)) & ((i >> (level - 1)) != (j >> (level - 1)))


@triton.jit
def own_scales(
    scales,
    n,
    L,
    J: tl.constexpr,
    COLUMNS: tl.constexpr,
    LINEAR: tl.constexpr,
    DTYPE: tl.constexpr,
    TREE: tl.constexpr,
):
    """LAM of a part's own J tokens, in so many columns; scales: of the first of them. Whoever takes it has to leave out
    j > i."""
    i = tl.arange(0, J)
    if TREE.radix_log > 1 and not LINEAR:
        return gather_scales(scales.data, scales.t, n, L, i, J, TREE)
    else:
        last = load_scale(scales.data, scales.t, n, 0 if LINEAR else COLUMNS - 1, L, i)
        scales_JJ = prefetched(last, DTYPE)[:, None]
        if not LINEAR:
            for level in tl.static_range(COLUMNS - 1):
                scale = prefetched(load_scale(scales.data, scales.t, n, level, L, i), DTYPE)
                scales_JJ = tl.where(is_level(i, level, J, TREE), scale[:, None], scales_JJ)
        return scales_JJ


@triton.jit
def in_chunk_part(
    x,
    scores,
    L,
    scale,
    K: tl.constexpr,
    C: tl.constexpr,
    J: tl.constexpr,
    TK: tl.constexpr,
    EARLIER: tl.constexpr,
    LINEAR: tl.constexpr,
    DTYPE: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """The rows of one part, an `InChunk`. EARLIER: there is one before it, which it reads in the last column. scores:
    the chunk's, or None."""
    COLUMNS: tl.constexpr = TREE.column - EARLIER if TREE.column > 1 else 1
    own: tl.constexpr = J if EARLIER else 0
    k_own, n = rows_from(x.k, own), x.n
    G_own, inverse_own = load_tokens(x.G, own, J), load_tile(x.inverse, own, own, C, J)
    if scores is not None:
        scores_own = load_tile(scores, own, own, C, J)
    else:
        scores_own = multiply_rows(x.q, k_own, n, n, K, J, TK, MATH)
    scores_own = (scores_own * (decay(G_own, G_own, tl.arange(0, J), J) * scale)).to(MATH.dot)
    effective_own = tl.dot(scores_own, inverse_own, input_precision=MATH.precision)
    store_block(x.effective, own, own, effective_own, C, C, J, J)
    scales_own = own_scales(x.scales, n, L, J, COLUMNS, LINEAR, DTYPE, TREE)
    is_read = tl.arange(0, J)[:, None] >= tl.arange(0, J)[None, :]
    store_block(x.weights, own, own, tl.where(is_read, effective_own * scales_own, 0.0), C, C, J, J)
    weight_own = load_strength(rows_from(x.beta, own), n, J) * tl.exp2(G_own)
    effective_own = (effective_own * -weight_own[None, :]).to(MATH.dot)
    if EARLIER:
        n_first = tl.minimum(x.n_keys, J)
        G_first, inverse_first = load_tokens(x.G, 0, J), load_tile(x.inverse, 0, 0, C, J)
        scores_first = multiply_rows(x.q, x.k, n, n_first, K, J, TK, MATH)
        scores_first = (scores_first * (tl.exp2(G_own[:, None] - G_first[None, :]) * scale)).to(MATH.dot)
        effective_first = tl.dot(scores_first, inverse_first, input_precision=MATH.precision)
        inverse_across = load_tile(x.inverse, own, 0, C, J)
        effective_first = tl.dot(scores_own, inverse_across, effective_first, input_precision=MATH.precision)
        store_block(x.effective, own, 0, effective_first, C, C, J, J)
        scale_first = prefetched(load_scale(x.scales.data, x.scales.t, n, TREE.column - 1, L, tl.arange(0, J)), DTYPE)
        store_block(x.weights, own, 0, effective_first * scale_first[:, None], C, C, J, J)
        weight_first = load_strength(x.beta, n_first, J) * tl.exp2(G_first)
        effective_first = (effective_first * -weight_first[None, :]).to(MATH.dot)
    for t in range(0, K, TK):
        x_JT = load_rows(x.q.data, x.q.t, n, t, J, K, TK).to(tl.float32) * (tl.exp2(G_own)[:, None] * scale)
        k_JT = load_rows(k_own.data, k_own.t, n, t, J, K, TK).to(MATH.dot)
        x_JT = tl.dot(effective_own, k_JT, x_JT, input_precision=MATH.precision)
        if EARLIER:
            k_JT = load_rows(x.k.data, x.k.t, n_first, t, J, K, TK).to(MATH.dot)
            x_JT = tl.dot(effective_first, k_JT, x_JT, input_precision=MATH.precision)
        store_block(x.q_in, own, t, x_JT, C, K, J, TK)


@launcher
@triton.jit(do_not_specialize=SIZES)
def in_chunk_kernel(
    q,
    k,
    beta,
    level_scales,
    saved,
    inside,
    q_in,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    scale,
    K: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    TK: tl.constexpr,
    LINEAR: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """C / PARTS rows of one chunk, one head: T and T * LAM, and X, q_in [chunk, H, C, K]."""
    sizes = Sizes(T, N, H, R, L, cap)
    DTYPE: tl.constexpr = level_scales.data.dtype.element_ty
    J: tl.constexpr = C // PARTS
    part = part_of_head(table, sizes, C, PARTS)
    chunk, own, h = part.whole, part.own, part.h
    if chunk.n <= 0:
        return
    row, group = chunk.c * sizes.H + h, h // sizes.R
    x = InChunk(
        own.n,
        chunk.n,
        head_rows(q, own, group),
        head_rows(k, chunk, group),
        head_rows(beta, chunk, h),
        head_rows(level_scales, own, h),
        inverse_at(saved, chunk, h, C),
        saved.cumulative + row * C,
        inside.effective + row * (C * C),
        inside.weights + row * (C * C),
        q_in + row * (C * K),
    )
    if saved.scores is not None:
        in_chunk_part(x, saved.scores + row * (C * C), L, scale, K, C, J, TK, False, LINEAR, DTYPE, TREE, MATH)
    elif part.first == 0:
        in_chunk_part(x, None, L, scale, K, C, J, TK, False, LINEAR, DTYPE, TREE, MATH)
    elif PARTS > 1:
        in_chunk_part(x, None, L, scale, K, C, J, TK, True, LINEAR, DTYPE, TREE, MATH)


def in_chunk(x: Inputs, saved: Saved) -> tuple[Inside, Tensor]:
    """T and T * LAM; and X, the queries at the start of their chunk [chunk, H, C, K]."""
    chunks, H, C, parts = x.layout.chunks, x.heads, x.chunk_size, x.tiling.parts("in_chunk")
    inside = Inside(*(x.empty(chunks, H, C, C, dtype=x.dtype) for _ in range(2)))
    q_in = x.empty(chunks, H, C, x.key_dim, dtype=x.dtype)
    in_chunk_kernel[(chunks * parts * H,)](
        x.q,
        x.k,
        x.beta,
        x.level_scales,
        saved,
        inside,
        q_in,
        x.layout.table,
        *x.sizes,
        x.scale,
        C=C,
        PARTS=parts,
        LINEAR=x.sizes.L == 1,
        TREE=x.tree,
        **x.key_constants("in_chunk"),
    )
    return inside, q_in

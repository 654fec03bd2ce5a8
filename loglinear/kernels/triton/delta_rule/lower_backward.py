"""The triangular inverse of a chunk, differentiated.

    T = S A,   A = (I + N)^-1,   N = tril(diag(b) K K^T * dec, -1),   U = A R,   [S_z | P_z] = Kd^T U + [0 | exp(Gam) I]

The products of A give dN = -A^T dA A^T, which has A^T (Kd [dS_z | dP_z]) U^T = A^T (Kd dKd^T) in it,

    dN = -tril(T^T dS + A^T (Kd dKd^T), -1),   dN' = diag(b) dN * dec

A chunk of 128 is two parts of 64 tokens; tiles above the diagonal are neither computed nor read. With a diagonal gate
the keys are Kd, dec is in their products, which are there, and dN' is the gradient of these.
"""

# C chunk, J tokens of a part, H heads, K key
from typing import NamedTuple

import triton
import triton.language as tl

from loglinear.kernels.triton.args import Sizes, Slab
from loglinear.kernels.triton.delta_rule.states import SIZES, Inputs, Inside, InsideGradients, Lower, Saved, Writes
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
from loglinear.kernels.triton.tiles import load_rows, slab_at, store_block


class LowerPart(NamedTuple):
    """A part of n tokens, in a chunk of n_keys. dbeta begins with the part, all others with the chunk."""

    n: tl.tensor
    n_keys: tl.tensor
    k: HeadRows
    beta: HeadRows
    dkeys: HeadRows
    dbeta: HeadRows
    cumulative: tl.tensor
    inverse: tl.tensor
    effective: tl.tensor
    dscores: tl.tensor
    dlower: tl.tensor
    sums: tl.tensor
    dlog_row: tl.tensor
    dlog_column: tl.tensor
    dlog_state: tl.tensor


@triton.jit
def key_products(keys, n, to_end, dkeys, K: tl.constexpr, J: tl.constexpr, TK: tl.constexpr, MATH: tl.constexpr):
    """Kd dKd^T of J tokens each. dKd is float32: where a key comes again, what it has along that key is a small part of
    it, less than it would be rounded by."""
    products_JJ = tl.zeros([J, J], tl.float32)
    for column in range(0, K, TK):
        k_JT = load_rows(keys.data, keys.t, n, column, J, K, TK).to(MATH.dot)
        dkeys_JT = load_rows(dkeys.data, dkeys.t, J, column, J, K, TK)
        high_JT = dkeys_JT.to(MATH.dot)
        products_JJ = tl.dot(k_JT, tl.trans(high_JT), products_JJ, input_precision=MATH.precision)
        if MATH.dot == tl.bfloat16:
            low_JT = (dkeys_JT - high_JT.to(tl.float32)).to(MATH.dot)
            products_JJ = tl.dot(k_JT, tl.trans(low_JT), products_JJ)
    return products_JJ * to_end[:, None]


@triton.jit
def lower_part(
    x,
    products,
    K: tl.constexpr,
    C: tl.constexpr,
    J: tl.constexpr,
    TK: tl.constexpr,
    KEY_TILES: tl.constexpr,
    VALUE_TILES: tl.constexpr,
    EARLIER: tl.constexpr,
    LATER: tl.constexpr,
    MATH: tl.constexpr,
):
    """The rows of one part, a `LowerPart`. EARLIER, LATER: there is one before it, behind it. products: of the chunk's
    keys, or None."""
    own: tl.constexpr = J if EARLIER else 0
    i, n, k_own = tl.arange(0, J), x.n, rows_from(x.k, own)
    G, total = load_tokens(x.cumulative, own, J), tl.load(x.cumulative + (C - 1))
    strength, to_end = load_strength(rows_from(x.beta, own), n, J), tl.exp2(total - G)

    dstrength, dlog_row = tl.zeros([J], tl.float32), tl.zeros([J], tl.float32)
    if products is None:
        dlog_row += tl.load(x.dlog_row + own + i)
    for tile in tl.static_range(KEY_TILES):
        dstrength += tl.load(x.sums + tile * C + own + i)
    dlog_row += dstrength * strength
    for tile in tl.static_range(VALUE_TILES):
        dstrength += tl.load(x.sums + (KEY_TILES + tile) * C + own + i)

    # The tile of dN on the diagonal. What is above the diagonal of the products would give nothing below it; without it
    # the compiler finds 25 registers fewer.
    products_JJ = key_products(k_own, n, to_end, rows_from(x.dkeys, own), K, J, TK, MATH)
    tl.store(x.dlog_state + own + i, tl.sum(tl.where(i[:, None] == i[None, :], products_JJ, 0.0), 1))
    products_JJ = tl.where(i[:, None] >= i[None, :], products_JJ, 0.0).to(MATH.dot)
    dlower_JJ = tl.dot(tl.trans(load_tile(x.inverse, own, own, C, J)), products_JJ, input_precision=MATH.precision)
    effective_JJ, dscores_JJ = load_tile(x.effective, own, own, C, J), load_tile(x.dscores, own, own, C, J)
    dlower_JJ = tl.dot(tl.trans(effective_JJ), dscores_JJ, dlower_JJ, input_precision=MATH.precision)
    if LATER:
        k_later, n_later = rows_from(x.k, J), x.n_keys - J
        to_end = tl.exp2(total - load_tokens(x.cumulative, J, J))
        products_JJ = key_products(k_later, n_later, to_end, x.dkeys, K, J, TK, MATH)
        inverse_JJ = tl.trans(load_tile(x.inverse, J, 0, C, J))
        dlower_JJ = tl.dot(inverse_JJ, products_JJ.to(MATH.dot), dlower_JJ, input_precision=MATH.precision)
        effective_JJ, dscores_JJ = load_tile(x.effective, J, 0, C, J), load_tile(x.dscores, J, 0, C, J)
        dlower_JJ = tl.dot(tl.trans(effective_JJ), dscores_JJ, dlower_JJ, input_precision=MATH.precision)
    dlower_JJ *= -tl.where(i[:, None] > i[None, :], decay(G, G, i, J), 0.0)
    store_block(x.dlower, own, own, dlower_JJ * strength[:, None], C, C, J, J)
    if products is not None:
        dlower_JJ *= load_tile(products, own, own, C, J)
    else:
        dlower_JJ *= multiply_rows(k_own, k_own, n, n, K, J, TK, MATH)
    dstrength += tl.sum(dlower_JJ, 1)
    dlower_JJ *= strength[:, None]
    dlog_row += tl.sum(dlower_JJ, 1)
    tl.store(x.dlog_column + own + i, tl.sum(dlower_JJ, 0))

    if EARLIER:  # the tile on its left
        n_first = tl.minimum(x.n_keys, J)
        products_JJ = key_products(k_own, n, to_end, x.dkeys, K, J, TK, MATH)
        inverse_JJ = tl.trans(load_tile(x.inverse, own, own, C, J))
        dlower_JJ = tl.dot(inverse_JJ, products_JJ.to(MATH.dot), input_precision=MATH.precision)
        effective_JJ, dscores_JJ = load_tile(x.effective, own, own, C, J), load_tile(x.dscores, own, 0, C, J)
        dlower_JJ = tl.dot(tl.trans(effective_JJ), dscores_JJ, dlower_JJ, input_precision=MATH.precision)
        dlower_JJ *= -tl.exp2(G[:, None] - load_tokens(x.cumulative, 0, J)[None, :])
        store_block(x.dlower, own, 0, dlower_JJ * strength[:, None], C, C, J, J)
        dlower_JJ *= multiply_rows(k_own, x.k, n, n_first, K, J, TK, MATH)
        dstrength += tl.sum(dlower_JJ, 1)
        dlower_JJ *= strength[:, None]
        dlog_row += tl.sum(dlower_JJ, 1)
        tl.store(x.dlog_column + i, tl.sum(dlower_JJ, 0))
    tl.store(x.dlog_row + own + i, dlog_row)
    tl.store(x.dbeta.data + i * x.dbeta.t, dstrength.to(x.dbeta.data.dtype.element_ty), mask=i < n)


@launcher
@triton.jit(do_not_specialize=SIZES)
def lower_backward_kernel(
    k,
    beta,
    saved,
    inside,
    dinside,
    writes,
    lower,
    dbeta,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    K: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    TK: tl.constexpr,
    KEY_TILES: tl.constexpr,
    VALUE_TILES: tl.constexpr,
    MATH: tl.constexpr,
):
    """C / PARTS rows of one chunk, one head: dN', dbeta, and of the decays' gradient each token's gift to the state and
    the columns' share of N; adds to the rows' share."""
    sizes = Sizes(T, N, H, R, L, cap)
    J: tl.constexpr = C // PARTS
    part = part_of_head(table, sizes, C, PARTS)
    chunk, own, h = part.whole, part.own, part.h
    if own.n <= 0:
        return
    row = chunk.c * sizes.H + h
    x = LowerPart(
        own.n,
        chunk.n,
        head_rows(k, chunk, h // sizes.R),
        head_rows(beta, chunk, h),
        HeadRows(writes.dkeys + row * (C * K), K),
        HeadRows(slab_at(dbeta, own, sizes, h, 1), dbeta.t),
        saved.cumulative + row * C,
        inverse_at(saved, chunk, h, C),
        inside.effective + row * (C * C),
        dinside.dscores + row * (C * C),
        lower.dlower + row * (C * C),
        writes.sums + row * ((KEY_TILES + VALUE_TILES) * C),
        dinside.dlog_row + row * C,
        dinside.dlog_column + (row * (2 * PARTS) + PARTS + part.part) * C,
        lower.dlog_state + row * C,
    )
    if saved.products is not None:
        lower_part(x, saved.products + row * (C * C), K, C, J, TK, KEY_TILES, VALUE_TILES, False, False, MATH)
    elif part.first == 0:
        lower_part(x, None, K, C, J, TK, KEY_TILES, VALUE_TILES, False, PARTS > 1, MATH)
    elif PARTS > 1:
        lower_part(x, None, K, C, J, TK, KEY_TILES, VALUE_TILES, True, False, MATH)


def lower_backward(
    x: Inputs, saved: Saved, inside: Inside, dinside: InsideGradients, writes: Writes, dbeta: Slab
) -> Lower:
    """Write dbeta, and return dN' and the last share of the decays' gradient. T * LAM is lost: dN' takes its place."""
    chunks, H, C, parts = x.layout.chunks, x.heads, x.chunk_size, x.tiling.parts("lower_backward")
    lower = Lower(inside.weights, x.empty(chunks, H, C))
    lower_backward_kernel[(chunks * parts * H,)](
        x.gifts,
        x.beta,
        saved,
        inside,
        dinside,
        writes,
        lower,
        dbeta,
        x.layout.table,
        *x.sizes,
        C=C,
        PARTS=parts,
        KEY_TILES=x.tiling.key_tiles("writes_backward"),
        VALUE_TILES=x.tiling.tiles("writes_backward"),
        **x.key_constants("lower_backward"),
    )
    return lower

"""The writes of a chunk, differentiated.

    S = Q K^T * dec,   T = S A,   A = (I + N)^-1,   N = tril(diag(b) K K^T * dec, -1),   Kd = diag(exp(Gam - G)) K
    M = [V | -diag(exp(G)) K],   R = diag(b) M,   U = A R
    O = (T * LAM) R_V,   X = diag(exp(G)) Q + T R_K,   [S_z | P_z] = Kd^T U + [0 | exp(Gam) I]

The writes, in tiles of columns of [V | K], which are treated alike, and what the chunk's end gives to its keys,

    dR = A^T Kd [dS_z | dP_z] + [(T * LAM)^T dO | T^T dX],   dM = diag(b) dR,   db = rowsum(dR * M)
    dKd = U [dS_z | dP_z]^T

`lower_backward` and `keys_backward` go on from there. With a diagonal gate Kd and exp(G) * K come with their decays.
"""

# C chunk, H heads, K key, V value
import triton
import triton.language as tl

from loglinear.kernels.triton.args import Rows, Sizes, Slab
from loglinear.kernels.triton.delta_rule.states import (
    SIZES,
    EntryGradients,
    Inputs,
    Inside,
    InsideGradients,
    Saved,
    Writes,
)
from loglinear.kernels.triton.delta_rule.tiles import HeadRows, head_rows, inverse_at, load_decays, load_strength
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.tiles import head_program, load_block, load_rows, locate, slab_at, store_block, store_rows


@triton.jit
def load_lower(matrix, C: tl.constexpr):
    """A lower triangular [C, C] matrix, of which nothing is read in the tile of 64 above the diagonal."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if C <= 64:
        return tl.load(matrix + (i * C + j))
    else:
        return tl.load(matrix + (i * C + j), mask=i // 64 >= j // 64, other=0.0)


@triton.jit
def dwrites_tile(
    keys,
    n,
    to_end,
    inverse,
    dstate,
    weights,
    g,
    column,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    MATH: tl.constexpr,
):
    """dR = A^T Kd dstate + weights^T g of one tile of columns."""
    dwrite_CV = tl.zeros([C, BV], tl.float32)
    for t in range(0, K, TK):
        k_CT = load_rows(keys.data, keys.t, n, t, C, K, TK).to(MATH.dot)
        dstate_TV = load_block(dstate, t, column, K, WIDTH, TK, BV)
        dwrite_CV = tl.dot(k_CT, dstate_TV, dwrite_CV, input_precision=MATH.precision)
    dwrite_CV = (dwrite_CV * to_end[:, None]).to(MATH.dot)
    dr_CV = tl.dot(tl.trans(load_lower(inverse, C)), dwrite_CV, input_precision=MATH.precision)
    g_CV = load_rows(g.data, g.t, n, column, C, WIDTH, BV).to(MATH.dot)
    return tl.dot(tl.trans(load_lower(weights, C)), g_CV, dr_CV, input_precision=MATH.precision)


@triton.jit
def add_written(
    dkeys_CT,
    inverse_CC,
    m,
    n,
    weight,
    dstate,
    t,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    MATH: tl.constexpr,
):
    """dKd + U dstate^T, one tile of the keys' columns. U first: where keys come again it is small."""
    for column in range(0, WIDTH, BV):
        m_CV = load_rows(m.data, m.t, n, column, C, WIDTH, BV).to(tl.float32) * weight[:, None]
        write_CV = tl.dot(inverse_CC, m_CV.to(MATH.dot), input_precision=MATH.precision).to(MATH.dot)
        dstate_TV = load_block(dstate, t, column, K, WIDTH, TK, BV)
        dkeys_CT = tl.dot(write_CV, tl.trans(dstate_TV), dkeys_CT, input_precision=MATH.precision)
    return dkeys_CT


@launcher
@triton.jit(do_not_specialize=SIZES)
def writes_backward_kernel(
    k,
    gifts,
    v,
    beta,
    saved,
    inside,
    dentries,
    dq_in,
    do,
    writes,
    dk,
    dv,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    MATH: tl.constexpr,
):
    """One chunk, one head, one tile of columns: of [R_K | R_V], or of dKd. R_V gives dv [B, T, H, V], R_K its part of
    dk [B, T, H, K], and each of their tiles a share of beta's gradient."""
    sizes = Sizes(T, N, H, R, L, cap)
    KEY_TILES: tl.constexpr = (K + TK - 1) // TK
    TILES: tl.constexpr = KEY_TILES + (V + BV - 1) // BV
    tile, h, c = head_program(TILES + KEY_TILES, sizes.H)
    chunk = locate(c.to(tl.int64), table, sizes, C)
    n = chunk.n
    if n <= 0:
        return
    row = chunk.c * sizes.H + h
    k_rows, v_rows = head_rows(k, chunk, h // sizes.R), head_rows(v, chunk, h)
    gift_rows = head_rows(gifts, chunk, h // sizes.R)
    strength = load_strength(head_rows(beta, chunk, h), n, C)
    G, total = load_decays(saved.cumulative + row * C, C)
    to_end, inverse = tl.exp2(total - G), inverse_at(saved, chunk, h, C)
    effective, weights = inside.effective + row * (C * C), inside.weights + row * (C * C)
    dstate, dtransition = dentries.states + row * (K * V), dentries.transitions + row * (K * K)
    sums = writes.sums + (row * TILES + tile) * C + tl.arange(0, C)
    if tile < KEY_TILES:
        t = tile * TK
        dq_rows = HeadRows(dq_in + row * (C * K), K)
        dr_CT = (
            dwrites_tile(gift_rows, n, to_end, inverse, dtransition, effective, dq_rows, t, K, K, C, TK, TK, MATH)
            * -tl.exp2(G)[:, None]
        )
        k_CT = load_rows(k_rows.data, k_rows.t, n, t, C, K, TK).to(tl.float32)
        tl.store(sums, tl.sum(dr_CT * k_CT, 1))
        store_rows(slab_at(dk, chunk, sizes, h, K), dk.t, n, t, dr_CT * strength[:, None], C, K, TK)
    elif tile < TILES:
        column = (tile - KEY_TILES) * BV
        do_rows = head_rows(do, chunk, h)
        dr_CV = dwrites_tile(gift_rows, n, to_end, inverse, dstate, weights, do_rows, column, V, K, C, TK, BV, MATH)
        v_CV = load_rows(v_rows.data, v_rows.t, n, column, C, V, BV).to(tl.float32)
        tl.store(sums, tl.sum(dr_CV * v_CV, 1))
        store_rows(slab_at(dv, chunk, sizes, h, V), dv.t, n, column, dr_CV * strength[:, None], C, V, BV)
    else:
        t = (tile - TILES) * TK
        inverse_CC, dkeys_CT = load_lower(inverse, C), tl.zeros([C, TK], tl.float32)
        weight = -strength * tl.exp2(G)
        dkeys_CT = add_written(dkeys_CT, inverse_CC, k_rows, n, weight, dtransition, t, K, K, C, TK, TK, MATH)
        dkeys_CT = add_written(dkeys_CT, inverse_CC, v_rows, n, strength, dstate, t, V, K, C, TK, BV, MATH)
        store_block(writes.dkeys + row * (C * K), 0, t, dkeys_CT, C, K, C, TK)


def writes_backward(
    x: Inputs,
    saved: Saved,
    inside: Inside,
    dinside: InsideGradients,
    dentries: EntryGradients,
    do: Rows,
    dk: Slab,
    dv: Slab,
) -> Writes:
    """Write dv, and of dk the part of R_K; return what the keys and beta still have to gather."""
    chunks, H, C, K = x.layout.chunks, x.heads, x.chunk_size, x.key_dim
    key_tiles, value_tiles = x.tiling.key_tiles("writes_backward"), x.tiling.tiles("writes_backward")
    writes = Writes(x.empty(chunks, H, C, K), x.empty(chunks, H, key_tiles + value_tiles, C))
    writes_backward_kernel[(chunks * (2 * key_tiles + value_tiles) * H,)](
        x.k,
        x.gifts,
        x.v,
        x.beta,
        saved,
        inside,
        dentries,
        dinside.dq_in,
        do,
        writes,
        dk,
        dv,
        x.layout.table,
        *x.sizes,
        C=C,
        **x.constants("writes_backward"),
    )
    return writes

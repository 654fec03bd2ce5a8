"""What the backward needs again of the forward's inside of a chunk, computed once.

    S = Q K^T * dec,   T = S A,   T * LAM,   X = diag(exp(G)) Q + T R_K,   R_K = -diag(b exp(G)) K

A chunk of 128 is two parts of 64 tokens. S, T and A are lower triangular: the first part's rows have one tile of 64
columns, the second's have two, its own and the earlier part's. Above the diagonal nothing is written, nor read.
"""

# C chunk, J tokens of a part, H heads, K key, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.compiler import prefetched
from loglinear.kernels.triton.delta_rule.tiles import SIZES, decay, load_strength, part_program
from loglinear.kernels.triton.levels import load_scale
from loglinear.kernels.triton.tiles import load_block, load_rows, store_block


@triton.jit
def load_tile(matrix, i, j, C: tl.constexpr, J: tl.constexpr, turn=0):
    """The [J, J] tile at (i, j) of a [C, C] matrix. `turn`: see `fresh_arange`."""
    return load_block(matrix, i, j, C, C, J, J, turn)


@triton.jit
def load_part(x, first, J: tl.constexpr):
    """J numbers of a chunk, from a part's first token on."""
    return tl.load(x + first + tl.arange(0, J))


@triton.jit
def multiply_rows(
    x_rows, y_rows, x_t, y_t, x_n, y_n,
    WIDTH: tl.constexpr, J: tl.constexpr, COLUMNS: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """X Y^T of J rows each. A loop that is not unrolled: no tile is kept in registers for another product."""
    products_JJ = tl.zeros([J, J], tl.float32)
    for column in range(0, WIDTH, COLUMNS):
        x_JT = load_rows(x_rows, x_t, x_n, column, J, WIDTH, COLUMNS).to(MATH.dot)
        y_JT = load_rows(y_rows, y_t, y_n, column, J, WIDTH, COLUMNS).to(MATH.dot)
        products_JJ = tl.dot(x_JT, tl.trans(y_JT), products_JJ, input_precision=MATH.precision)
    return products_JJ


@triton.jit
def is_level(i, level: tl.constexpr, J: tl.constexpr):
    """[i, j]: is level(i, j) = level, of a part's own tokens?"""
    i, j = i[:, None], tl.arange(0, J)[None, :]
    if level == 0:
        return i == j
    else:
        return ((i >> level) == (j >> level)) & ((i >> (level - 1)) != (j >> (level - 1)))


@triton.jit
def own_scales(scales, l_t, n, L, J: tl.constexpr, LOG_J: tl.constexpr, LINEAR: tl.constexpr, DTYPE: tl.constexpr):
    """LAM of a part's own J tokens; scales: of the first of them. Whoever takes it has to leave out j > i."""
    i = tl.arange(0, J)
    scales_JJ = prefetched(load_scale(scales, l_t, n, 0 if LINEAR else LOG_J, L, i), DTYPE)[:, None]
    if not LINEAR:
        for level in tl.static_range(LOG_J):
            scale = prefetched(load_scale(scales, l_t, n, level, L, i), DTYPE)
            scales_JJ = tl.where(is_level(i, level, J), scale[:, None], scales_JJ)
    return scales_JJ


@triton.jit
def in_chunk_part(
    arguments, K: tl.constexpr, C: tl.constexpr, J: tl.constexpr, LOG_C: tl.constexpr, TK: tl.constexpr,
    EARLIER: tl.constexpr, LINEAR: tl.constexpr, DTYPE: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """A part of n tokens, in a chunk of n_keys. EARLIER: there is one before it."""
    (
        q_rows, k_rows, q_t, k_t, n, n_keys, beta, beta_t, scales, l_t, L, inverse, G, effective, weights, seen, scale,
    ) = arguments  # fmt: skip
    own: tl.constexpr = J if EARLIER else 0
    own_rows = k_rows + own * k_t
    G_own, inverse_own = load_part(G, own, J), load_tile(inverse, own, own, C, J)
    scores_own = multiply_rows(q_rows, own_rows, q_t, k_t, n, n, K, J, TK, MATH)
    scores_own = (scores_own * (decay(G_own, G_own, tl.arange(0, J), J) * scale)).to(MATH.dot)
    effective_own = tl.dot(scores_own, inverse_own, input_precision=MATH.precision)
    store_block(effective, own, own, effective_own, C, C, J, J)
    scales_own = own_scales(scales, l_t, n, L, J, LOG_C - EARLIER, LINEAR, DTYPE)
    is_read = tl.arange(0, J)[:, None] >= tl.arange(0, J)[None, :]
    store_block(weights, own, own, tl.where(is_read, effective_own * scales_own, 0.0), C, C, J, J)
    weight_own = load_strength(beta + own * beta_t, beta_t, n, J) * tl.exp2(G_own)
    effective_own = (effective_own * -weight_own[None, :]).to(MATH.dot)
    if EARLIER:
        n_first = tl.minimum(n_keys, J)
        G_first, inverse_first = load_part(G, 0, J), load_tile(inverse, 0, 0, C, J)
        scores_first = multiply_rows(q_rows, k_rows, q_t, k_t, n, n_first, K, J, TK, MATH)
        scores_first = (scores_first * (tl.exp2(G_own[:, None] - G_first[None, :]) * scale)).to(MATH.dot)
        effective_first = tl.dot(scores_first, inverse_first, input_precision=MATH.precision)
        inverse_across = load_tile(inverse, own, 0, C, J)
        effective_first = tl.dot(scores_own, inverse_across, effective_first, input_precision=MATH.precision)
        store_block(effective, own, 0, effective_first, C, C, J, J)
        scale_first = prefetched(load_scale(scales, l_t, n, LOG_C, L, tl.arange(0, J)), DTYPE)
        store_block(weights, own, 0, effective_first * scale_first[:, None], C, C, J, J)
        weight_first = load_strength(beta, beta_t, n_first, J) * tl.exp2(G_first)
        effective_first = (effective_first * -weight_first[None, :]).to(MATH.dot)
    for t in range(0, K, TK):
        x_JT = load_rows(q_rows, q_t, n, t, J, K, TK).to(tl.float32) * (tl.exp2(G_own)[:, None] * scale)
        k_JT = load_rows(own_rows, k_t, n, t, J, K, TK).to(MATH.dot)
        x_JT = tl.dot(effective_own, k_JT, x_JT, input_precision=MATH.precision)
        if EARLIER:
            k_JT = load_rows(k_rows, k_t, n_first, t, J, K, TK).to(MATH.dot)
            x_JT = tl.dot(effective_first, k_JT, x_JT, input_precision=MATH.precision)
        store_block(seen, own, t, x_JT, C, K, J, TK)


@triton.jit(do_not_specialize=SIZES)
def in_chunk_kernel(
    q, k, beta, level_scales, inverse, cumulative, effective, weights, seen, table,
    T, N, H, R, L, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, beta_b, beta_t, beta_h, l_b, l_t, l_h, a_c,
    K: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, PARTS: tl.constexpr, TK: tl.constexpr,
    LINEAR: tl.constexpr, MATH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """C / PARTS rows of one chunk, one head: T and T * LAM [chunk, H, C, C], and X [chunk, H, C, K]."""
    DTYPE: tl.constexpr = level_scales.dtype.element_ty
    J: tl.constexpr = C // PARTS
    h, c, b, first, z, z0, sequence, n_keys, own, n = part_program(table, T, N, H, C, PARTS, PACKED)
    if n_keys <= 0:
        return
    row = c * H + h
    k_rows = k + b * k_b + first * k_t + (h // R) * k_h
    q_rows = q + b * q_b + (first + own) * q_t + (h // R) * q_h
    beta += b * beta_b + first * beta_t + h * beta_h
    scales = level_scales + b * l_b + (first + own) * l_t + h * l_h
    inverse += c * a_c + h * (C * C)
    effective, weights = effective + row * (C * C), weights + row * (C * C)
    G, seen = cumulative + row * C, seen + row * (C * K)
    arguments = (
        q_rows, k_rows, q_t, k_t, n, n_keys, beta, beta_t, scales, l_t, L, inverse, G, effective, weights, seen, scale,
    )  # fmt: skip
    if own == 0:
        in_chunk_part(arguments, K, C, J, LOG_C, TK, False, LINEAR, DTYPE, MATH)
    elif PARTS > 1:
        in_chunk_part(arguments, K, C, J, LOG_C, TK, True, LINEAR, DTYPE, MATH)

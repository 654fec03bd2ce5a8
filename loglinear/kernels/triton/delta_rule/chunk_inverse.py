"""The triangular inverse of each half of a chunk, exact, by doubling.

    A = (I + N)^-1,   N = tril(diag(b) K K^T * dec, -1)

With N_l the entries of N between sibling blocks of 2**l tokens, and X_l the inverse inside blocks of 2**l,

    X_{l+1} = X_l - X_l N_l X_l,   X_0 = I

which is substitution, block by block: nothing is ever summed that could cancel, as in the powers of N.
"""

# C rows of one half (or the whole) of a chunk, H heads, K key
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import key_products
from loglinear.kernels.triton.tiles import LOG2_E, MIN_LOG_DECAY, SIZES, exponent, head_program, locate, store_block


@triton.jit
def unit_lower_inverse(lower_CC, C: tl.constexpr, LOG_C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + lower)^-1 of a strictly lower triangular matrix."""
    i = tl.arange(0, C)
    level = exponent(i[:, None] ^ i[None, :])
    x_CC = tl.where(i[:, None] == i[None, :], 1.0, tl.where(level == 0, -lower_CC, 0.0))
    for l in tl.static_range(1, LOG_C):
        between_CC = tl.where(level == l, lower_CC, 0.0)
        product_CC = tl.dot(between_CC, x_CC, input_precision=PRECISION)
        x_CC -= tl.dot(x_CC, product_CC, input_precision=PRECISION)
    return x_CC


@triton.jit(do_not_specialize=SIZES)
def chunk_inverse_kernel(
    k, beta, log_decay, inverse, cumulative, table,
    T, N, H, R,
    k_b, k_t, k_h, beta_b, beta_t, beta_h, g_b, g_t, g_h,
    K: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, HALVES: tl.constexpr, TK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, INVERSE_PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One half of a chunk, one head: A [chunk, half, H, C, C] and the cumulative log decay G [chunk, half, H, C], in
    base 2, from the half's start."""
    _, h, part = head_program(1, H)
    half, c = part % HALVES, (part // HALVES).to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C * HALVES, PACKED)
    if end <= first:
        return
    first += half * C
    n = tl.maximum(tl.minimum(end - first, C), 0).to(tl.int32)  # a half without tokens changes nothing
    row = part.to(tl.int64) * H + h
    i = tl.arange(0, C)
    g = tl.load(log_decay + b * g_b + first * g_t + h * g_h + i * g_t, mask=i < n, other=0.0).to(tl.float32)
    G = tl.cumsum(tl.maximum(g, MIN_LOG_DECAY) * LOG2_E, 0)
    tl.store(cumulative + row * C + i, G)
    strength = tl.load(beta + b * beta_b + first * beta_t + h * beta_h + i * beta_t, mask=i < n, other=0.0)
    keys_CC = key_products(k + b * k_b + first * k_t + (h // R) * k_h, k_t, n, G, K, C, TK, DOT, PRECISION)
    lower_CC = tl.where(i[:, None] > i[None, :], keys_CC * strength.to(tl.float32)[:, None], 0.0)
    inverse_CC = unit_lower_inverse(lower_CC, C, LOG_C, INVERSE_PRECISION)
    store_block(inverse + row * (C * C), 0, 0, inverse_CC, C, C, C, C)

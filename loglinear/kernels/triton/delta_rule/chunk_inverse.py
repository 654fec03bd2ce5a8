"""The triangular inverse of each chunk, exact.

    A = (I + N)^-1,   N = tril(diag(b) K K^T * dec, -1)

by doubling inside blocks of J = 64 tokens: with N_l the entries of N between sibling blocks of 2**l tokens, and X_l the
inverse inside blocks of 2**l,

    X_{l+1} = X_l - X_l N_l X_l,   X_0 = I

which is substitution, block by block: nothing is ever summed that could cancel, as in the powers of N. The factors may
be bfloat16 rounded to nearest; tf32, which cuts digits off, gathers an error of 2 % where a key comes again and again.
The two halves of a longer chunk take the same step once more, on the one block that is not 0.
"""

# C chunk, J a half of it (or all of it), H heads, K key
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import SIZES, decay, key_products, load_strength, locate
from loglinear.kernels.triton.tiles import LOG2_E, MIN_LOG_DECAY, exponent, head_program, load_block, store_block


@triton.jit
def unit_lower_inverse(lower_JJ, J: tl.constexpr, LOG_J: tl.constexpr, MATH: tl.constexpr):
    """(I + lower)^-1 of a strictly lower triangular matrix."""
    i = tl.arange(0, J)
    level = exponent(i[:, None] ^ i[None, :])
    x_JJ = tl.where(i[:, None] == i[None, :], 1.0, tl.where(level == 0, -lower_JJ, 0.0))
    for l in tl.static_range(1, LOG_J):
        between_JJ = tl.where(level == l, lower_JJ, 0.0)
        product_JJ = tl.dot(between_JJ.to(MATH.dot), x_JJ.to(MATH.dot), input_precision=MATH.precision)
        x_JJ -= tl.dot(x_JJ.to(MATH.dot), product_JJ.to(MATH.dot), input_precision=MATH.precision)
    return x_JJ


@triton.jit(do_not_specialize=SIZES)
def chunk_inverse_kernel(
    k, beta, log_decay, inverse, cumulative, table,
    T, N, H, R,
    k_b, k_t, k_h, beta_b, beta_t, beta_h, g_b, g_t, g_h,
    K: tl.constexpr, C: tl.constexpr, J: tl.constexpr, LOG_J: tl.constexpr, TK: tl.constexpr,
    MATH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk, one head: A [chunk, H, C, C] and the cumulative log decay G [chunk, H, C], in base 2."""
    _, h, chunk = head_program(1, H)
    c = chunk.to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    if end <= first:
        return
    row = c * H + h
    i = tl.arange(0, J)
    k_rows = k + b * k_b + first * k_t + (h // R) * k_h
    beta += b * beta_b + first * beta_t + h * beta_h
    log_decay += b * g_b + first * g_t + h * g_h
    cumulative += row * C
    inverse += row * (C * C)
    before = tl.zeros([], tl.float32)
    for half in range(C // J):
        n = tl.minimum(end - first - half * J, J).to(tl.int32)  # a half without tokens changes nothing
        g = tl.load(log_decay + (half * J + i) * g_t, mask=i < n, other=0.0).to(tl.float32)
        G = before + tl.cumsum(tl.maximum(g, MIN_LOG_DECAY) * LOG2_E, 0)
        tl.store(cumulative + half * J + i, G)
        strength = load_strength(beta + half * J * beta_t, beta_t, n, J)
        k_half = k_rows + half * J * k_t
        lower_JJ = key_products(k_half, k_t, n, k_half, n, K, J, TK, MATH) * strength[:, None]
        lower_JJ = tl.where(i[:, None] > i[None, :], lower_JJ * decay(G, G, i, J), 0.0)
        inverse_JJ = unit_lower_inverse(lower_JJ, J, LOG_J, MATH)
        store_block(inverse, half * J, half * J, inverse_JJ, C, C, J, J)
        before = tl.sum(tl.where(i == J - 1, G, 0.0), 0)
    if C > J:
        tl.debug_barrier()
        n = tl.minimum(end - first, J).to(tl.int32)
        n_last = tl.maximum(tl.minimum(end - first - J, J), 0).to(tl.int32)
        between_JJ = key_products(k_rows + J * k_t, k_t, n_last, k_rows, n, K, J, TK, MATH)
        between_JJ *= load_strength(beta + J * beta_t, beta_t, n_last, J)[:, None]
        between_JJ *= tl.exp2(tl.load(cumulative + J + i)[:, None] - tl.load(cumulative + i)[None, :])
        first_JJ, last_JJ = load_block(inverse, 0, 0, C, C, J, J), load_block(inverse, J, J, C, C, J, J)
        product_JJ = tl.dot(between_JJ.to(MATH.dot), first_JJ, input_precision=MATH.precision)
        store_block(
            inverse, J, 0, -tl.dot(last_JJ, product_JJ.to(MATH.dot), input_precision=MATH.precision), C, C, J, J
        )
        store_block(inverse, 0, J, tl.zeros([J, J], tl.float32), C, C, J, J)

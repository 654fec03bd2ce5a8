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

from loglinear.fenwick import log2
from loglinear.kernels.triton.args import Sizes
from loglinear.kernels.triton.delta_rule.products import math_of
from loglinear.kernels.triton.delta_rule.states import SIZES, Inputs, Saved
from loglinear.kernels.triton.delta_rule.tiles import (
    decay,
    head_rows,
    inverse_at,
    load_strength,
    load_tile,
    row_products,
    rows_from,
)
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.tiles import LOG2_E, MIN_LOG_DECAY, exponent, head_program, locate, part_of, store_block


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


@launcher
@triton.jit(do_not_specialize=SIZES)
def chunk_inverse_kernel(
    k,
    beta,
    log_decay,
    saved,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    K: tl.constexpr,
    C: tl.constexpr,
    J: tl.constexpr,
    LOG_J: tl.constexpr,
    TK: tl.constexpr,
    MATH: tl.constexpr,
):
    """One chunk, one head: A and G."""
    sizes = Sizes(T, N, H, R, L, cap)
    _, h, c = head_program(1, sizes.H)
    chunk = locate(c.to(tl.int64), table, sizes, C)
    if chunk.end <= chunk.first:
        return
    i = tl.arange(0, J)
    k_rows = head_rows(k, chunk, h // sizes.R)
    strengths, decays = head_rows(beta, chunk, h), head_rows(log_decay, chunk, h)
    cumulative, inverse = saved.cumulative + (chunk.c * sizes.H + h) * C, inverse_at(saved, chunk, h, C)
    before = tl.zeros([], tl.float32)
    for half in range(C // J):
        n = part_of(chunk, half, J).n  # a half without tokens changes nothing
        g = tl.load(decays.data + (half * J + i) * decays.t, mask=i < n, other=0.0).to(tl.float32)
        G = before + tl.cumsum(tl.maximum(g, MIN_LOG_DECAY) * LOG2_E, 0)
        tl.store(cumulative + half * J + i, G)
        strength = load_strength(rows_from(strengths, half * J), n, J)
        k_half = rows_from(k_rows, half * J)
        lower_JJ = row_products(k_half, k_half, n, n, K, J, J, TK, MATH) * strength[:, None]
        lower_JJ = tl.where(i[:, None] > i[None, :], lower_JJ * decay(G, G, i, J), 0.0)
        inverse_JJ = unit_lower_inverse(lower_JJ, J, LOG_J, MATH)
        store_block(inverse, half * J, half * J, inverse_JJ, C, C, J, J)
        before = tl.sum(tl.where(i == J - 1, G, 0.0), 0)
    if C > J:
        tl.debug_barrier()
        n, n_last = part_of(chunk, 0, J).n, part_of(chunk, 1, J).n
        between_JJ = row_products(rows_from(k_rows, J), k_rows, n_last, n, K, J, J, TK, MATH)
        between_JJ *= load_strength(rows_from(strengths, J), n_last, J)[:, None]
        between_JJ *= tl.exp2(tl.load(cumulative + J + i)[:, None] - tl.load(cumulative + i)[None, :])
        first_JJ, last_JJ = load_tile(inverse, 0, 0, C, J), load_tile(inverse, J, J, C, J)
        product_JJ = tl.dot(between_JJ.to(MATH.dot), first_JJ, input_precision=MATH.precision)
        product_JJ = tl.dot(last_JJ, product_JJ.to(MATH.dot), input_precision=MATH.precision)
        store_block(inverse, J, 0, -product_JJ, C, C, J, J)
        store_block(inverse, 0, J, tl.zeros([J, J], tl.float32), C, C, J, J)


@launcher
@triton.jit(do_not_specialize=SIZES)
def products_inverse_kernel(
    beta,
    saved,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    C: tl.constexpr,
    LOG_C: tl.constexpr,
    MATH: tl.constexpr,
):
    """One chunk of at most 64 tokens, one head: A from the products of its keys; and G, 0 of rows that have decayed."""
    sizes = Sizes(T, N, H, R, L, cap)
    _, h, c = head_program(1, sizes.H)
    chunk = locate(c.to(tl.int64), table, sizes, C)
    if chunk.n <= 0:
        return
    i, row = tl.arange(0, C), chunk.c * sizes.H + h
    tl.store(saved.cumulative + row * C + i, tl.zeros([C], tl.float32))
    lower_CC = load_tile(saved.products + row * (C * C), 0, 0, C, C)
    lower_CC *= load_strength(head_rows(beta, chunk, h), chunk.n, C)[:, None]
    lower_CC = tl.where(i[:, None] > i[None, :], lower_CC, 0.0)
    inverse_CC = unit_lower_inverse(lower_CC, C, LOG_C, MATH)
    store_block(inverse_at(saved, chunk, h, C), 0, 0, inverse_CC, C, C, C, C)


def chunk_inverse(x: Inputs) -> Saved:
    """Each chunk's inverse, and its cumulative log decay."""
    chunks, H, C = x.layout.chunks, x.heads, x.chunk_size
    saved = Saved.of(x.empty(chunks, H, C, C, dtype=x.dtype), x.empty(chunks, H, C), x.decayed)
    if x.decayed is not None:
        options, math = x.plan["chunk_inverse"].options, math_of("chunk_inverse", x.math)
        products_inverse_kernel[(chunks * H,)](
            x.beta, saved, x.layout.table, *x.sizes, C=C, LOG_C=log2(C), MATH=math, **options
        )
        return saved
    J = min(C, 64)
    chunk_inverse_kernel[(chunks * H,)](
        x.k,
        x.beta,
        x.log_decay,
        saved,
        x.layout.table,
        *x.sizes,
        C=C,
        J=J,
        LOG_J=log2(J),
        **x.key_constants("chunk_inverse"),
    )
    return saved

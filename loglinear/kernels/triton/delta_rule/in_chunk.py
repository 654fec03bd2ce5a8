"""What the backward needs again of the forward's inside of a chunk, computed once.

S = Q K^T * dec,   T = S A,   X = diag(exp(G)) Q + S Er          (Er: see chunk_state.py)
"""

# C chunk, I of its rows, H heads, K key
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import decay, load_decays, part_program, query_products
from loglinear.kernels.triton.tiles import SIZES, load_block, load_rows, store_block


@triton.jit(do_not_specialize=SIZES)
def in_chunk_kernel(
    q, k, inverse, cumulative, erased, effective, seen, table,
    T, N, H, R, scale,
    q_b, q_t, q_h, k_b, k_t, k_h,
    K: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, TK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """C / PARTS rows of one chunk, one head: T [chunk, H, C, C] and X [chunk, H, C, K]."""
    I: tl.constexpr = C // PARTS
    h, c, b, first, z, z0, sequence, n_keys, skipped, n = part_program(table, T, N, H, C, PARTS, PACKED)
    if n_keys <= 0:
        return
    row, i = c * H + h, tl.arange(0, I)
    k_rows = k + b * k_b + first * k_t + (h // R) * k_h
    q_rows = q + b * q_b + (first + skipped) * q_t + (h // R) * q_h
    G, _ = load_decays(cumulative + row * C, C)
    G_rows = tl.load(cumulative + row * C + skipped + i)
    scores_IC = query_products(q_rows, k_rows, q_t, k_t, n, n_keys, K, I, C, TK, DOT, PRECISION)
    scores_IC = (scores_IC * (decay(G_rows, G, skipped + i, C) * scale)).to(DOT)
    inverse_CC = load_block(inverse + row * (C * C), 0, 0, C, C, C, C)
    effective_IC = tl.dot(scores_IC, inverse_CC, input_precision=PRECISION)
    store_block(effective + row * (C * C), skipped, 0, effective_IC, C, C, I, C)
    for t in tl.static_range(0, K, TK):
        x_IT = load_rows(q_rows, q_t, n, t, I, K, TK).to(tl.float32) * (tl.exp2(G_rows)[:, None] * scale)
        erased_CT = load_block(erased + row * (C * K), 0, t, C, K, C, TK)
        x_IT = tl.dot(scores_IC, erased_CT, x_IT, input_precision=PRECISION)
        store_block(seen + row * (C * K), skipped, t, x_IT, C, K, I, TK)

"""Each chunk's own transition and state.

P_z = exp(Gam) I + D_z,   D_z = Kd^T Er,   S_z = Kd^T U
Er = -Ab diag(exp(G)) K,   U = Ab V,   Kd = diag(exp(Gam - G)) K
"""

# C chunk, H heads, K key, V value
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import SIZES, load_decays, load_strength
from loglinear.kernels.triton.tiles import head_program, load_block, load_rows, locate, store_block


@triton.jit
def own_block(
    inverse, weight, to_end, v_rows, v_t, k_rows, k_t, n, out,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = Kd^T A diag(weight) V."""
    for column in range(0, V, BV):
        weights_CC = (load_block(inverse, 0, 0, C, C, C, C).to(tl.float32) * weight[None, :]).to(DOT)
        v_CV = load_rows(v_rows, v_t, n, column, C, V, BV).to(DOT)
        written_CV = tl.dot(weights_CC, v_CV, input_precision=PRECISION)
        written_CV = (written_CV * to_end[:, None]).to(DOT)
        for t in range(0, K, TK):
            k_CT = load_rows(k_rows, k_t, n, t, C, K, TK).to(DOT)
            own_TV = tl.dot(tl.trans(k_CT), written_CV, input_precision=PRECISION)
            store_block(out, t, column, own_TV, K, V, TK, BV)


@triton.jit(do_not_specialize=SIZES)
def chunk_state_kernel(
    k, v, beta, inverse, cumulative, transitions, states, table,
    T, N, H, R,
    k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk, one head: its state [chunk, H, K, V] and transition [chunk, H, K, K]."""
    _, h, chunk = head_program(1, H)
    c = chunk.to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    row = c * H + h
    k_rows = k + b * k_b + first * k_t + (h // R) * k_h
    strength = load_strength(beta + b * beta_b + first * beta_t + h * beta_h, beta_t, n, C)
    G, total = load_decays(cumulative + row * C, C)
    to_end = tl.exp2(total - G)
    inverse += row * (C * C)
    own_block(
        inverse, -strength * tl.exp2(G), to_end, k_rows, k_t, k_rows, k_t, n,
        transitions + row * (K * K),
        K, K, C, TK, BV, DOT, PRECISION,
    )  # fmt: skip
    own_block(
        inverse, strength, to_end, v + b * v_b + first * v_t + h * v_h, v_t, k_rows, k_t, n,
        states + row * (K * V),
        K, V, C, TK, BV, DOT, PRECISION,
    )  # fmt: skip

"""Each chunk's own transition and state.

P_z = exp(Gam) I + D_z,   D_z = Kd^T Er,   S_z = Kd^T U
Er = A diag(-b exp(G)) K,   U = A diag(b) V,   Kd = diag(exp(Gam - G)) K
"""

# C chunk, H heads, K key, V value
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import SIZES, load_decays, load_strength, locate
from loglinear.kernels.triton.tiles import head_program, load_block, load_rows, store_block


@triton.jit(do_not_specialize=SIZES)
def chunk_state_kernel(
    k, v, beta, inverse, cumulative, states, table,
    T, N, H, R,
    k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, a_c,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    TRANSITION: tl.constexpr, MATH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One whole chunk, one head, one tile of columns: S, states [chunk, H, K, V]. TRANSITION: D, where V is K and v
    is k."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, chunk = head_program(TILES, H)
    c, column = chunk.to(tl.int64), tile * BV
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    if end - first < C:
        return
    row = c * H + h
    k_rows = k + b * k_b + first * k_t + (h // R) * k_h
    strength = load_strength(beta + b * beta_b + first * beta_t + h * beta_h, beta_t, C, C)
    G, total = load_decays(cumulative + row * C, C)
    inverse_CC = load_block(inverse + c * a_c + h * (C * C), 0, 0, C, C, C, C)
    if TRANSITION:
        rows, t, weight = k_rows, k_t, -strength * tl.exp2(G)
    else:
        rows, t, weight = v + b * v_b + first * v_t + h * v_h, v_t, strength
    v_CV = (load_rows(rows, t, C, column, C, V, BV).to(tl.float32) * weight[:, None]).to(MATH.dot)
    written_CV = tl.dot(inverse_CC, v_CV, input_precision=MATH.precision)
    written_CV = (written_CV * tl.exp2(total - G)[:, None]).to(MATH.dot)
    for a in range(0, K, TK):
        k_CT = load_rows(k_rows, k_t, C, a, C, K, TK).to(MATH.dot)
        own_TV = tl.dot(tl.trans(k_CT), written_CV, input_precision=MATH.precision)
        store_block(states + row * (K * V), a, column, own_TV, K, V, TK, BV)

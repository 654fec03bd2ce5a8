"""A whole chunk's own transition and state.

P_z = exp(Gam) I + D_z,   D_z = Kd^T Er,   S_z = Kd^T U
Er = -Ab diag(exp(G)) K,   U = Ab V,   Kd = diag(exp(Gam - G)) K
"""

# C chunk, K key, V value
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import load_decays, load_strength
from loglinear.kernels.triton.tiles import load_block, load_rows, store_block


@triton.jit
def own_block(
    inverse, weight, to_end, v_rows, v_t, k_rows, k_t, out,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = Kd^T A diag(weight) V."""
    for column in range(0, V, BV):
        weights_CC = (load_block(inverse, 0, 0, C, C, C, C).to(tl.float32) * weight[None, :]).to(DOT)
        v_CV = load_rows(v_rows, v_t, C, column, C, V, BV).to(DOT)
        written_CV = tl.dot(weights_CC, v_CV, input_precision=PRECISION)
        written_CV = (written_CV * to_end[:, None]).to(DOT)
        for t in range(0, K, TK):
            k_CT = load_rows(k_rows, k_t, C, t, C, K, TK).to(DOT)
            own_TV = tl.dot(tl.trans(k_CT), written_CV, input_precision=PRECISION)
            store_block(out, t, column, own_TV, K, V, TK, BV)


@triton.jit
def chunk_blocks(
    k_rows, v_rows, beta, inverse, cumulative, transition, state, k_t, v_t, beta_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores D and S of one chunk and head."""
    strength = load_strength(beta, beta_t, C, C)
    G, total = load_decays(cumulative, C)
    to_end = tl.exp2(total - G)
    own_block(
        inverse, -strength * tl.exp2(G), to_end, k_rows, k_t, k_rows, k_t, transition, K, K, C, TK, TK, DOT, PRECISION
    )
    own_block(inverse, strength, to_end, v_rows, v_t, k_rows, k_t, state, K, V, C, TK, BV, DOT, PRECISION)

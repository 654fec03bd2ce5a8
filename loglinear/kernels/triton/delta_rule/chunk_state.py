"""Each chunk's own transition and state.

    P_z = exp(Gam) I + Kd^T Er,   S_z = Kd^T U
    Er = -Ab diag(exp(G)) K,   U = Ab V,   Kd = diag(exp(Gam - G)) K
"""

# C chunk, H heads, K key, V value
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import RUN, levels_below, load_decays, load_strength, real_merges
from loglinear.kernels.triton.tiles import SIZES, head_program, load_block, load_rows, locate, store_block


@triton.jit(do_not_specialize=SIZES)
def chunk_state_kernel(
    k, v, beta, inverse, cumulative, blocks, rights, kept, table,
    T, N, H, R, cap,
    k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    TRANSITION: tl.constexpr, KEEP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk, one head, BV columns of its state, blocks [chunk, H, K, V]. TRANSITION: of its transition, V is K
    then; it goes where the sweep begins, into rights where the chunk merges with a block on its left. KEEP: and Er or
    U, kept [chunk, H, C, V]."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, chunk = head_program(TILES, H)
    c, column = chunk.to(tl.int64), tile * BV
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    row = c * H + h
    k_rows = k + b * k_b + first * k_t + (h // R) * k_h
    G, total = load_decays(cumulative + row * C, C)
    weight = load_strength(beta + b * beta_b + first * beta_t + h * beta_h, beta_t, n, C)
    out = blocks + row * (K * V)
    if TRANSITION:
        merges = real_merges(z % RUN + 1, z, z0, levels_below(cap, 0), 0)
        out = tl.where(merges > 0, rights + (row - H) * (K * V), out)
        v_rows, weight = k_rows, -weight * tl.exp2(G)
    else:
        v_rows = v + b * v_b + first * v_t + h * v_h
    weights_CC = (load_block(inverse + row * (C * C), 0, 0, C, C, C, C).to(tl.float32) * weight[None, :]).to(DOT)
    v_CV = load_rows(v_rows, v_t, n, column, C, V, BV).to(DOT)
    written_CV = tl.dot(weights_CC, v_CV, input_precision=PRECISION)
    if KEEP:
        store_block(kept + row * (C * V), 0, column, written_CV, C, V, C, BV)
    written_CV = (written_CV * tl.exp2(total - G)[:, None]).to(DOT)
    x, j = tl.arange(0, TK), column + tl.arange(0, BV)
    for t in tl.static_range(0, K, TK):
        k_CT = load_rows(k_rows, k_t, n, t, C, K, TK).to(DOT)
        own_TV = tl.dot(tl.trans(k_CT), written_CV, input_precision=PRECISION)
        if TRANSITION:
            own_TV += tl.where((t + x)[:, None] == j[None, :], tl.exp2(total), 0.0)
        store_block(out, t, column, own_TV, K, V, TK, BV)

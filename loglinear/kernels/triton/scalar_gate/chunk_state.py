"""Each chunk's own state at its end, and what it does to a state that comes in.

    S_z = K^T diag(exp(Gam - G)) V          log P_z = Gam

G the cumulative log decay inside the chunk, Gam its last value.
"""

# C chunk, G groups, H heads, K key, V value
import triton
import triton.language as tl

from loglinear.kernels.triton.tiles import LOG2_E, MIN_LOG_DECAY, SIZES, head_program, load_rows, locate, store_state


@triton.jit(do_not_specialize=SIZES)
def chunk_state_kernel(
    k, v, log_decay, slots, totals, cumulative, table,
    T, N, H, R,
    k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk, one head, one tile of V. Also writes G to cumulative [chunk, H, C] and Gam to totals [chunk, H]."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, chunk = head_program(TILES, H)
    c = chunk.to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    i = tl.arange(0, C)
    g = tl.load(log_decay + b * g_b + first * g_t + h * g_h + i * g_t, mask=i < n, other=0.0).to(tl.float32)
    G = tl.cumsum(tl.maximum(g, MIN_LOG_DECAY) * LOG2_E, 0)
    total = tl.sum(tl.where(i == C - 1, G, 0.0), 0)
    if tile == 0:
        tl.store(cumulative + (c * H + h) * C + i, G)
        tl.store(totals + c * H + h, total)
    k_CK = load_rows(k + b * k_b + first * k_t + (h // R) * k_h, k_t, n, 0, C, K, BK).to(DOT)
    v_CV = load_rows(v + b * v_b + first * v_t + h * v_h, v_t, n, tile * BV, C, V, BV)
    decayed_CV = (v_CV.to(tl.float32) * tl.exp2(total - G)[:, None]).to(DOT)
    state_KV = tl.dot(tl.trans(k_CK), decayed_CV, input_precision=PRECISION)
    store_state(slots + (c * H + h) * (K * V), tile * BV, state_KV, K, V, BK, BV)

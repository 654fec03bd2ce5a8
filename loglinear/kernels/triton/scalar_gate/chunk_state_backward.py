"""The adjoint of `chunk_state`: what a chunk's tokens give to its state.

dV += diag(exp(Gam - G)) K dS          dK += diag(exp(Gam - G)) V dS^T
"""

# C chunk, H heads, G groups, K key, V value
import triton
import triton.language as tl

from loglinear.kernels.triton.tiles import SIZES, group_program, load_rows, load_state, store_rows


@triton.jit(do_not_specialize=SIZES)
def chunk_state_backward_kernel(
    k, v, cumulative, totals, dslots, dk, dv, state_flow, table,
    T, N, H, R, plane,
    k_b, k_t, k_h, v_b, v_t, v_h, dv_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SPLIT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk and R / SPLIT heads of one group. Adds to dk (plane `split`) and dv, and writes state_flow
    [chunk, H, C]: what each token gives."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    split, group, head, share, c, b, first, end, z, z0, sequence = group_program(table, T, N, H, R, C, SPLIT, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    token, groups = b * T + first, H // R
    i = tl.arange(0, C)
    k_CK = load_rows(k + b * k_b + first * k_t + group * k_h, k_t, n, 0, C, K, BK).to(DOT)
    dk_CK = tl.zeros([C, BK], tl.float32)
    for h in range(head, head + share):
        row = (c * H + h) * C + i
        to_end = tl.exp2(tl.load(totals + c * H + h) - tl.load(cumulative + row))[:, None]
        flow = tl.zeros([C], tl.float32)
        for tile in range(TILES):
            v_CV = load_rows(v + b * v_b + first * v_t + h * v_h, v_t, n, tile * BV, C, V, BV).to(tl.float32)
            dstate_KV = load_state(dslots + (c * H + h) * (K * V), tile * BV, K, V, BK, BV)
            dk_CK = tl.dot((v_CV * to_end).to(DOT), tl.trans(dstate_KV), dk_CK, input_precision=PRECISION)
            dv_CV = tl.dot(k_CK, dstate_KV, input_precision=PRECISION) * to_end
            flow += tl.sum(dv_CV * v_CV, 1)
            to_dv = dv + token * dv_t + h * V
            dv_CV += load_rows(to_dv, dv_t, n, tile * BV, C, V, BV).to(tl.float32)
            store_rows(to_dv, dv_t, n, tile * BV, dv_CV, C, V, BV)
        tl.store(state_flow + row, flow)
    to_dk = dk + split * plane + (token * groups + group) * K
    dk_CK += load_rows(to_dk, groups * K, n, 0, C, K, BK)
    store_rows(to_dk, groups * K, n, 0, dk_CK, C, K, BK)

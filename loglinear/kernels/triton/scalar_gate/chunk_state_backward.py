"""What a chunk's tokens give, differentiated on the side of the keys and values.

    dV += diag(exp(Gam - G)) K dS          dK = diag(exp(Gam - G)) V dS^T + dA^T Q

The first terms are the adjoint of `chunk_state`; dA, of the chunk itself, comes from `in_chunk_backward`.
"""

# C chunk, H heads, G groups, K key, V value
import triton
import triton.language as tl

from loglinear.kernels.triton.tiles import (
    SIZES,
    as_product,
    group_program,
    identity,
    load_rows,
    load_state,
    scores_tile,
    store_rows,
)


@triton.jit(do_not_specialize=SIZES)
def chunk_state_backward_kernel(
    q, k, v, cumulative, totals, dslots, dscores, dk, dv, state_flow, table,
    T, N, H, R, plane, dscores_plane,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dv_t,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HALVES: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, SPLIT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One half of a chunk and R / SPLIT heads of one group. Writes dk (plane `split`) and state_flow [chunk, H, C],
    what each token gives to the state; adds to dv."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    ROWS: tl.constexpr = C // HALVES
    split, group, head, share, half, n, first, c, b, end, z, z0, sequence = group_program(
        table, T, N, H, R, C, HALVES, SPLIT, PACKED
    )
    if n <= 0:
        return
    token, groups = b * T + first, H // R
    i = tl.arange(0, ROWS)
    q_rows = q + b * q_b + first * q_t + group * q_h
    one = identity(BV, DOT)
    dk_CK = tl.zeros([ROWS, BK], tl.float32)
    # The second half may have no tokens, and then no dscores.
    for later in range(half, tl.where(end - first > ROWS, HALVES, half + 1)):
        n_later = tl.minimum(end - first - (later - half) * ROWS, ROWS).to(tl.int32)
        tile_CC = scores_tile(dscores, dscores_plane, split, c, groups, group, later, half, HALVES, ROWS)
        dscores_CC = tl.load(tile_CC + i[:, None] * ROWS + i[None, :])
        q_CK = load_rows(q_rows + (later - half) * ROWS * q_t, q_t, n_later, 0, ROWS, K, BK).to(DOT)
        dk_CK = tl.dot(tl.trans(dscores_CC), q_CK, dk_CK, input_precision=PRECISION)
    k_CK = load_rows(k + b * k_b + first * k_t + group * k_h, k_t, n, 0, ROWS, K, BK).to(DOT)
    row = (c * H + head) * C + half * ROWS + i
    G_h, total_h = tl.load(cumulative + row), tl.load(totals + c * H + head)
    for h in range(head, head + share):
        # Vectors are loaded one head ahead.
        to_end = tl.exp2(total_h - G_h)[:, None]
        ahead = tl.minimum(h + 1, head + share - 1)
        G_h, total_h = tl.load(cumulative + row + (ahead - head) * C), tl.load(totals + c * H + ahead)
        flow = tl.zeros([ROWS], tl.float32)
        for tile in (tl.static_range if TILES <= 2 else tl.range)(TILES):
            to_dv = dv + token * dv_t + h * V
            in_chunk_CV = load_rows(to_dv, dv_t, n, tile * BV, ROWS, V, BV, h)
            v_CV = load_rows(v + b * v_b + first * v_t + h * v_h, v_t, n, tile * BV, ROWS, V, BV, h).to(DOT)
            v_CV = as_product(v_CV, one, PRECISION)
            dstate_KV = load_state(dslots + (c * H + h) * (K * V), tile * BV, K, V, BK, BV)
            dk_CK = tl.dot((v_CV * to_end).to(DOT), tl.trans(dstate_KV), dk_CK, input_precision=PRECISION)
            dv_CV = tl.dot(k_CK, dstate_KV, input_precision=PRECISION) * to_end
            flow += tl.sum(dv_CV * v_CV, 1)
            dv_CV += in_chunk_CV.to(tl.float32)
            store_rows(to_dv, dv_t, n, tile * BV, dv_CV, ROWS, V, BV, h)
        tl.store(state_flow + row + (h - head) * C, flow)
    store_rows(dk + split * plane + (token * groups + group) * K, groups * K, n, 0, dk_CK, ROWS, K, BK)

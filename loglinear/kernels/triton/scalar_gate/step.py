"""One token of every row, in one launch.

With i the token's place in its chunk, G the sum of the chunk's decays up to it and G_j that of the tokens behind j,

    o = sum_j lambda[level(i, j)] exp(G_j) (q^T k_j) v_j + sum_m lambda_m exp(G) q^T S_m

Blocks S_m are only read, until the chunk is full: then all of them move to its end, and the smaller ones join it. The
others of its new size become one number older.
"""

# C chunk, M blocks, H heads, R heads of a group, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.decode import (
    SIZES,
    begin,
    decays,
    end,
    is_idle,
    join_blocks,
    load_buffer,
    load_decay,
    load_token,
    merged_into,
    own_program,
    place_scales,
    read_blocks,
    token_at,
)
from loglinear.kernels.triton.launcher import launcher


@launcher
@triton.jit(do_not_specialize=SIZES)
def step_kernel(
    q,
    k,
    v,
    log_decay,
    level_scales,
    active,
    state,
    out,
    H,
    R,
    L,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    TREE: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    UNROLL: tl.constexpr,
    SPARSE: tl.constexpr,
):
    """Reads q, k, v and the gates of the new tokens; changes the state; writes out [N, H, V]."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    n, h, tile = own_program(H, TILES)
    columns = tile * BV + tl.arange(0, BV)
    inside = columns < V
    out += (n * H + h) * V
    if is_idle(active, n):
        tl.store(out + columns, tl.zeros([BV], tl.float32).to(out.dtype.element_ty), mask=inside)
        return
    t, G, group = begin(state.position, n), H // R, h // R
    place, z = (t % C).to(tl.int32), t // C
    q_row, k_row = token_at(q, n, group), token_at(k, n, group)
    k_buffer = state.k + (n * C * G + group) * K
    v_buffer = state.v + (n * C * H + h) * V
    decay_buffer = state.decay + n * C * H + h
    scales, blocks = token_at(level_scales, n, h), state.blocks + (n * TREE.blocks * H + h) * (K * V)

    g = load_decay(token_at(log_decay, n, h))
    behind, total = decays(decay_buffer, H, g, place, C)
    v_V = load_token(token_at(v, n, h), columns, inside)
    scores = tl.zeros([C], tl.float32)
    for kt in range(0, K, TK):
        j = kt + tl.arange(0, TK)
        k_T = load_token(k_row, j, j < K)
        k_CT = load_buffer(k_buffer, G * K, place, k_T, kt, K, C, TK)
        scores += tl.sum(k_CT * load_token(q_row, j, j < K)[None, :], 1)
        if (tile == 0) & (h % R == 0):
            tl.store(k_buffer + place * (G * K) + j, k_T, mask=j < K)
    tl.store(v_buffer + place * (H * V) + columns, v_V, mask=inside)
    if tile == 0:
        tl.store(decay_buffer + place * H, g)
    weights = scores * place_scales(scales, place, L, C, TREE) * tl.exp2(behind)
    v_CV = load_buffer(v_buffer, H * V, place, v_V, tile * BV, V, C, BV)
    o_V = tl.sum(weights[:, None] * v_CV, 0)
    read_TV = tl.zeros([TK, BV], tl.float32)
    for kt in range(0, K, TK):
        j = kt + tl.arange(0, TK)
        q_T = load_token(q_row, j, j < K)
        read_TV = read_blocks(
            read_TV, q_T, scales, z, L, blocks, H * (K * V), kt, tile * BV, K, V, TREE, TK, BV, UNROLL, SPARSE
        )
    o_V = (o_V + tl.sum(read_TV, 0) * tl.exp2(total)) * scale
    tl.store(out + columns, o_V.to(out.dtype.element_ty), mask=inside)

    if place == C - 1:
        target = merged_into(z, TREE)
        v_CV = load_buffer(v_buffer, H * V, place, v_V, tile * BV, V, C, BV)
        for kt in range(0, K, TK):
            j = kt + tl.arange(0, TK)
            k_CT = load_buffer(k_buffer, G * K, place, load_token(k_row, j, j < K), kt, K, C, TK)
            k_CT *= tl.exp2(behind)[:, None]
            joined_TV = tl.dot(tl.trans(k_CT), v_CV, input_precision="tf32x3")
            join_blocks(joined_TV, total, z, target, blocks, H * (K * V), kt, tile * BV, K, V, TREE, TK, BV)
    end(state.position, n, t, H * TILES)

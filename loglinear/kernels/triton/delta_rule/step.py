"""One token of every row, in one launch.

With i the token's place in its chunk, dec_j the decay from token j to it and exp(G_j) that from the chunk's start to j,
the rows of the chunk's formulas (`chunk_inverse`, `output`) are

    A_i = e_i - sum_r N_ir A_r,   N_ij = beta_i k_i^T k_j dec_j        kept from row to row
    T   = sum_r S_r A_r,          S_j = q^T k_j dec_j
    o   = sum_j lambda[level(i, j)] T_j beta_j v_j + sum_m lambda_m x^T S_m
    x   = exp(G_i) q - sum_j T_j beta_j exp(G_j) k_j

Blocks S_m are only read, until the chunk is full: then all of them go through its transition, and the smaller ones
join it. The others of its new size become one number older. With W = A diag(beta exp(G)) K, U = A diag(beta) V and
Kd = diag(dec) K,

    S_m -> exp(G) S_m - Kd^T W S_m,    the chunk's own state Kd^T U
"""

# C chunk, M blocks, H heads, R heads of a group, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.decode import (
    SIZES,
    begin,
    decays,
    end,
    is_block,
    is_idle,
    is_pushed,
    load_buffer,
    load_decay,
    load_part,
    load_token,
    merged_into,
    own_program,
    place_scales,
    read_blocks,
    store_part,
    token_at,
)
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.tiles import LOG2_E

EPSILON = tl.constexpr(1e-6)


@triton.jit
def load_joined(
    blocks,
    z,
    first,
    last,
    first_row,
    first_column,
    H,
    TREE: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
):
    """A tile of the sum of the blocks first .. last that are there."""
    state_TV = tl.zeros([TK, BV], tl.float32)
    for m in range(first, last + 1):
        there = is_block(z, m, TREE)
        state_TV += load_part(blocks + m * H * (K * V), first_row, first_column, there, K, V, TK, BV)
    return state_TV


@triton.jit
def sources(turn, target, TREE: tl.constexpr):
    """The block m of a turn, and the first and the last one of those that become it: all smaller ones of `target`."""
    m = turn
    if TREE.is_queue:  # from the oldest on, so that a block is written after its older neighbour has taken it
        m = TREE.blocks - 1 + target - turn
    first, last = tl.where(m > target, m, 0), m
    if TREE.is_queue:
        first -= is_pushed(m - 1, target, TREE).to(tl.int32)
        last -= is_pushed(m, target, TREE).to(tl.int32)
    return m, first, last


@launcher
@triton.jit(do_not_specialize=SIZES)
def step_kernel(
    q,
    k,
    v,
    log_decay,
    beta,
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
    UNIT: tl.constexpr,
):
    """Reads q, k, v and the gates of the new tokens; changes the state; writes out [N, H, V]. UNIT: q and k are first
    brought to length 1."""
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
    i = tl.arange(0, C)
    q_row, k_row = token_at(q, n, group), token_at(k, n, group)
    k_buffer = state.k + (n * C * G + group) * K
    v_buffer = state.v + (n * C * H + h) * V
    decay_buffer = state.decay + n * C * H + h
    beta_buffer = state.beta + n * C * H + h
    inverse = state.inverse + (n * C * H + h) * C
    scales, blocks = token_at(level_scales, n, h), state.blocks + (n * TREE.blocks * H + h) * (K * V)

    q_scale, k_scale = scale, 1.0
    if UNIT:
        q_square, k_square = tl.zeros([TK], tl.float32), tl.zeros([TK], tl.float32)
        for kt in range(0, K, TK):
            j = kt + tl.arange(0, TK)
            q_T, k_T = load_token(q_row, j, j < K), load_token(k_row, j, j < K)
            q_square += q_T * q_T
            k_square += k_T * k_T
        q_scale *= tl.rsqrt(tl.sum(q_square, 0) + EPSILON)
        k_scale *= tl.rsqrt(tl.sum(k_square, 0) + EPSILON)

    g, strength = load_decay(token_at(log_decay, n, h)), tl.load(token_at(beta, n, h)).to(tl.float32)
    behind, total = decays(decay_buffer, H, g, place, C)
    own_decay = tl.where(i == place, g, tl.load(decay_buffer + i * H, mask=i < place, other=0.0))
    from_start = tl.exp2(tl.cumsum(own_decay, 0) * LOG2_E)
    strengths = tl.where(i == place, strength, tl.load(beta_buffer + i * H, mask=i < place, other=0.0))
    v_V = load_token(token_at(v, n, h), columns, inside)
    scores, keys = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for kt in range(0, K, TK):
        j = kt + tl.arange(0, TK)
        k_T = load_token(k_row, j, j < K) * k_scale
        k_CT = load_buffer(k_buffer, G * K, place, k_T, kt, K, C, TK)
        scores += tl.sum(k_CT * load_token(q_row, j, j < K)[None, :], 1)
        keys += tl.sum(k_CT * k_T[None, :], 1)
        if (tile == 0) & (h % R == 0):
            tl.store(k_buffer + place * (G * K) + j, k_T, mask=j < K)
    tl.store(v_buffer + place * (H * V) + columns, v_V, mask=inside)
    scores *= tl.exp2(behind) * q_scale
    erased = tl.where(i < place, keys * tl.exp2(behind) * strength, 0.0)
    # Both products with A's earlier rows; the new row of A, of which T takes S's last entry, is made of one of them.
    own_score = tl.sum(tl.where(i == place, scores, 0.0), 0)
    others = tl.where(i < place, scores, 0.0) - own_score * erased
    i_C1, j_1C = i[:, None], i[None, :]
    inverse_CC = tl.load(inverse + (i_C1 * (H * C) + j_1C), mask=(i_C1 < place) & (j_1C < place), other=0.0)
    is_own = tl.where(i == place, 1.0, 0.0)
    row_C = is_own - tl.sum(erased[:, None] * inverse_CC, 0)
    effective = (own_score * is_own + tl.sum(others[:, None] * inverse_CC, 0)) * strengths
    if tile == 0:
        tl.store(decay_buffer + place * H, g)
        tl.store(beta_buffer + place * H, strength)
        tl.store(inverse + place * (H * C) + i, row_C)
    weights = effective * place_scales(scales, place, L, C, TREE)
    v_CV = load_buffer(v_buffer, H * V, place, v_V, tile * BV, V, C, BV)
    o_V = tl.sum(weights[:, None] * v_CV, 0)
    read_TV = tl.zeros([TK, BV], tl.float32)
    for kt in range(0, K, TK):
        j = kt + tl.arange(0, TK)
        k_CT = load_buffer(k_buffer, G * K, place, load_token(k_row, j, j < K) * k_scale, kt, K, C, TK)
        x_T = load_token(q_row, j, j < K) * (tl.exp2(total) * q_scale)
        x_T -= tl.sum((effective * from_start)[:, None] * k_CT, 0)
        read_TV = read_blocks(
            read_TV, x_T, scales, z, L, blocks, H * (K * V), kt, tile * BV, K, V, TREE, TK, BV, UNROLL, SPARSE
        )
    o_V += tl.sum(read_TV, 0)
    tl.store(out + columns, o_V.to(out.dtype.element_ty), mask=inside)

    if place == C - 1:
        target = merged_into(z, TREE)
        whole_CC = tl.where(i_C1 == place, row_C[None, :], inverse_CC) * strengths[None, :]
        v_CV = load_buffer(v_buffer, H * V, place, v_V, tile * BV, V, C, BV)
        own_CV = tl.dot(whole_CC, v_CV, input_precision="tf32x3")
        for turn in range(target, TREE.blocks):
            m, first, last = sources(turn, target, TREE)
            if (m <= target) | is_block(z, first, TREE) | is_block(z, last, TREE):
                new_CV = tl.where(m > target, 0.0, own_CV)
                for row in range(0, K, TK):
                    j = row + tl.arange(0, TK)
                    k_T = load_token(k_row, j, j < K) * k_scale
                    k_CT = load_buffer(k_buffer, G * K, place, k_T, row, K, C, TK) * from_start[:, None]
                    seen_CT = tl.dot(whole_CC, k_CT, input_precision="tf32x3")
                    state_TV = load_joined(blocks, z, first, last, row, tile * BV, H, TREE, K, V, TK, BV)
                    new_CV -= tl.dot(seen_CT, state_TV, input_precision="tf32x3")
                for row in range(0, K, TK):
                    j = row + tl.arange(0, TK)
                    k_T = load_token(k_row, j, j < K) * k_scale
                    k_CT = load_buffer(k_buffer, G * K, place, k_T, row, K, C, TK) * tl.exp2(behind)[:, None]
                    state_TV = load_joined(blocks, z, first, last, row, tile * BV, H, TREE, K, V, TK, BV)
                    state_TV *= tl.exp2(total)
                    state_TV += tl.dot(tl.trans(k_CT), new_CV, input_precision="tf32x3")
                    store_part(blocks + m * H * (K * V), row, tile * BV, state_TV, True, K, V, TK, BV)
                if TREE.is_queue:
                    tl.debug_barrier()  # the next one writes what this one has read
        tl.debug_barrier()  # they have been read
        for m in range(0, target):
            for row in range(0, K, TK):
                empty_TV = tl.zeros([TK, BV], tl.float32)
                store_part(blocks + m * H * (K * V), row, tile * BV, empty_TV, True, K, V, TK, BV)
    end(state.position, n, t, H * TILES)

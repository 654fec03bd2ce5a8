"""Each chunk's own transition and state.

Z = [I | 0],  for each half of the chunk:   Z <- exp(Gam) Z + Kd^T ([0 | U] - W Z),  in the end Z = [P_z | S_z]
W = Ab diag(exp(G)) K,   U = Ab V,   Kd = diag(exp(Gam - G)) K
"""

# C rows of one half (or the whole) of a chunk, H heads, K key, V value
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import RUN, levels_below, load_decays, load_write, real_merges
from loglinear.kernels.triton.tiles import SIZES, head_program, load_rows, locate, store_block


@triton.jit(do_not_specialize=SIZES)
def chunk_state_kernel(
    k, v, beta, inverse, cumulative, blocks, rights, table,
    T, N, H, R, cap,
    k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HALVES: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    TRANSITION: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk, one head, BV columns of its state, blocks [chunk, H, K, V]. TRANSITION: of its transition, V is K
    then; it goes where the sweep begins, into rights where the chunk merges with a block on its left."""
    NK: tl.constexpr = (K + TK - 1) // TK
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, chunk = head_program(TILES, H)
    c, column = chunk.to(tl.int64), tile * BV
    b, first, end, z, z0, sequence = locate(c, table, T, N, C * HALVES, PACKED)
    if end <= first:
        return
    k_rows, v_rows = k + b * k_b + first * k_t + (h // R) * k_h, v + b * v_b + first * v_t + h * v_h
    beta += b * beta_b + first * beta_t + h * beta_h
    x, j = tl.arange(0, TK), column + tl.arange(0, BV)
    own = ()
    for half in tl.static_range(HALVES):
        n = tl.minimum(end - first - half * C, C).to(tl.int32)
        part = (c * HALVES + half) * H + h
        G, total = load_decays(cumulative + part * C, C)
        write_CC = load_write(inverse + part * (C * C), beta + half * C * beta_t, beta_t, n, C, DOT)
        k_half = k_rows + half * C * k_t
        from_start, to_end, across = tl.exp2(G)[:, None], tl.exp2(total - G)[:, None], tl.exp2(total)
        if not TRANSITION:
            v_CV = load_rows(v_rows + half * C * v_t, v_t, n, column, C, V, BV).to(DOT)
            written_CV = tl.dot(write_CC, v_CV, input_precision=PRECISION)
        elif half == 0:
            incoming_CV = (load_rows(k_half, k_t, n, column, C, K, BV).to(tl.float32) * from_start).to(DOT)
            written_CV = -tl.dot(write_CC, incoming_CV, input_precision=PRECISION)
        else:
            written_CV = tl.zeros([C, BV], tl.float32)
        if half > 0:
            for t in tl.static_range(NK):
                incoming_CT = (load_rows(k_half, k_t, n, t * TK, C, K, TK).to(tl.float32) * from_start).to(DOT)
                erase_CT = tl.dot(write_CC, incoming_CT, input_precision=PRECISION).to(DOT)
                written_CV -= tl.dot(erase_CT, own[t].to(DOT), input_precision=PRECISION)
        written_CV = written_CV.to(DOT)
        new = ()
        for t in tl.static_range(NK):
            outgoing_CT = (load_rows(k_half, k_t, n, t * TK, C, K, TK).to(tl.float32) * to_end).to(DOT)
            if half > 0:
                through_TV = own[t] * across
            elif TRANSITION:
                through_TV = tl.where((t * TK + x)[:, None] == j[None, :], across, 0.0)
            else:
                through_TV = tl.zeros([TK, BV], tl.float32)
            new = new + (tl.dot(tl.trans(outgoing_CT), written_CV, through_TV, input_precision=PRECISION),)
        own = new
    out = blocks + (c * H + h) * (K * V)
    if TRANSITION:
        merges = real_merges(z % RUN + 1, z, z0, levels_below(cap, 0), 0)
        out = tl.where(merges > 0, rights + ((c - 1) * H + h) * (K * V), out)
    for t in tl.static_range(NK):
        store_block(out, t * TK, column, own[t], K, V, TK, BV)

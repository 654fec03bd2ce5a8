"""The Fenwick array of transitions and states, one storey (three levels, 8 entries) at a time.

    own:      Z = [I | 0],  for each half of the chunk:   Z <- exp(Gam) Z + Kd^T ([0 | U] - W Z)
              W = Ab diag(exp(G)) K,  U = Ab V,  Kd = diag(exp(Gam - G)) K,   in the end [P_z | S_z] = Z
    merge:    P_block = P_right P_left           S_block = P_right S_left + S_right

An entry of storey s is a chunk e with e + 1 a multiple of 8**s; it stands for the 8**s chunks that end there. From the
cap on, blocks merge with the prefix of their run. One program takes the entries of a run in order, each with all blocks
on its left: first the transitions, then, for tiles of V on their own, the states. Each block is the left one of at most
one merge: `rights`, at its row, keeps P_right of that merge for the states and for the backward.
"""

# C rows of one half (or the whole) of a chunk, H heads, K key, V value
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import (
    BITS,
    RUN,
    entry_bits,
    levels_below,
    load_decays,
    load_write,
    multiply,
    node_row,
    num_merges,
)
from loglinear.kernels.triton.tiles import (
    SIZES,
    head_program,
    load_block,
    load_rows,
    locate,
    locate_run,
    rows_again,
    store_block,
)


@triton.jit
def run_entries(number, count, z0, storey):
    """The first and the last + 1 entry, from 1, of a run that exist: their chunks lie in z0 .. count - 1."""
    before, shift = number * RUN, entry_bits(storey)
    return tl.maximum((z0 >> shift) - before, 0) + 1, tl.minimum((count >> shift) - before, RUN) + 1


@triton.jit
def own_block(
    k, v, beta, inverse, cumulative, table, row, column, h, turn,
    T, N, H, R, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HALVES: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    TRANSITION: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """BV columns of S_z, with TRANSITION of P_z, as tiles of TK rows. The latter are the former of V = -diag(exp(G)) K
    that start from the identity."""
    NK: tl.constexpr = (K + TK - 1) // TK
    b, first, end, z_, z0_, sequence_ = locate(row, table, T, N, C * HALVES, PACKED)
    k_rows, v_rows = k + b * k_b + first * k_t + (h // R) * k_h, v + b * v_b + first * v_t + h * v_h
    beta += b * beta_b + first * beta_t + h * beta_h
    x, j = rows_again(turn, 0, TK), column + tl.arange(0, BV)
    z = ()
    for t in tl.static_range(NK):
        if TRANSITION:
            z = z + (tl.where((t * TK + x)[:, None] == j[None, :], 1.0, 0.0),)
        else:
            z = z + (tl.zeros([TK, BV], tl.float32),)
    for half in range(HALVES):
        n = tl.minimum(end - first - half * C, C).to(tl.int32)
        part = (row * HALVES + half) * H + h
        G, total = load_decays(cumulative + part * C, C)
        write_CC = load_write(inverse + part * (C * C), beta + half * C * beta_t, beta_t, n, C, DOT)
        k_half = k_rows + half * C * k_t
        from_start, to_end, across = tl.exp2(G)[:, None], tl.exp2(total - G)[:, None], tl.exp2(total)
        written_CV = tl.zeros([C, BV], tl.float32)
        if not TRANSITION:
            v_CV = load_rows(v_rows + half * C * v_t, v_t, n, column, C, V, BV, turn).to(DOT)
            written_CV = tl.dot(write_CC, v_CV, input_precision=PRECISION)
        for t in tl.static_range(NK):
            incoming_CT = load_rows(k_half, k_t, n, t * TK, C, K, TK, turn).to(tl.float32) * from_start
            erase_CT = tl.dot(write_CC, incoming_CT.to(DOT), input_precision=PRECISION).to(DOT)
            written_CV -= tl.dot(erase_CT, z[t].to(DOT), input_precision=PRECISION)
        written_CV = written_CV.to(DOT)
        new = ()
        for t in tl.static_range(NK):
            outgoing_CT = (load_rows(k_half, k_t, n, t * TK, C, K, TK, turn).to(tl.float32) * to_end).to(DOT)
            new = new + (tl.dot(tl.trans(outgoing_CT), written_CV, z[t] * across, input_precision=PRECISION),)
        z = new
    return z


@triton.jit(do_not_specialize=SIZES)
def transition_sweep_kernel(
    k, beta, inverse, cumulative, transitions, rights, table, runs,
    T, N, H, R, cap, storey,
    k_b, k_t, k_h, beta_b, beta_t, beta_h,
    K: tl.constexpr, C: tl.constexpr, HALVES: tl.constexpr, TK: tl.constexpr, OWN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One run, one head: transitions [chunk, H, K, K] in place, rights [chunk, H, K, K]. OWN: the chunks' own first."""
    SIZE: tl.constexpr = K * K
    _, h, run = head_program(1, H)
    origin, count, number, z0, sequence = locate_run(run, runs, N, storey, PACKED, BITS)
    rel, shift = levels_below(cap, storey), entry_bits(storey)
    start, stop = run_entries(number, count, z0, storey)
    for i in range(start, stop):
        z = ((number * RUN + i) << shift) - 1
        row = origin + z
        slot = transitions + (row * H + h) * SIZE
        merges = tl.zeros([], tl.int32)  # with blocks that have a transition, and are no nodes
        for m in range(num_merges(i, rel)):
            merges += (z - (1 << (shift + m)) >= z0).to(tl.int32)
        source = tl.where(merges > 0, rights + ((row - (1 << shift)) * H + h) * SIZE, slot)
        for j in range(0, K, TK):
            if OWN:
                own = own_block(
                    k, k, beta, inverse, cumulative, table, row, j, h, z,
                    T, N, H, R, k_b, k_t, k_h, k_b, k_t, k_h, beta_b, beta_t, beta_h,
                    K, K, C, HALVES, TK, TK, True, DOT, PRECISION, PACKED,
                )  # fmt: skip
                for t in tl.static_range((K + TK - 1) // TK):
                    store_block(source, t * TK, j, own[t], K, K, TK, TK, z)
            elif merges > 0:
                for s in range(0, K, TK):
                    store_block(source, s, j, load_block(slot, s, j, K, K, TK, TK), K, K, TK, TK)
        for m in range(merges):
            left, farther = row - (1 << (shift + m)), row - (1 << (shift + m + 1))
            target = tl.where(m + 1 < merges, rights + (farther * H + h) * SIZE, slot)
            multiply(source, transitions + (left * H + h) * SIZE, target, K, TK, PRECISION, z)
            source = target


@triton.jit(do_not_specialize=SIZES)
def state_sweep_kernel(
    k, v, beta, inverse, cumulative, transitions, rights, slots, nodes, table, runs,
    T, N, H, R, cap, storey,
    k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HALVES: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    OWN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One run, one head, one tile of V: slots [chunk, H, K, V] in place. OWN: the chunks' own states first."""
    SIZE: tl.constexpr = K * V
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, run = head_program(TILES, H)
    origin, count, number, z0, sequence = locate_run(run, runs, N, storey, PACKED, BITS)
    rel, shift = levels_below(cap, storey), entry_bits(storey)
    start, stop = run_entries(number, count, z0, storey)
    for i in range(start, stop):
        z = ((number * RUN + i) << shift) - 1
        row = origin + z
        slot = slots + (row * H + h) * SIZE
        if OWN:
            own = own_block(
                k, v, beta, inverse, cumulative, table, row, tile * BV, h, z,
                T, N, H, R, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h,
                K, V, C, HALVES, TK, BV, False, DOT, PRECISION, PACKED,
            )  # fmt: skip
        tl.debug_barrier()  # what this program wrote to the left blocks is seen
        for t in tl.static_range((K + TK - 1) // TK):
            if OWN:
                state = own[t]
            else:
                state = load_block(slot, t * TK, tile * BV, K, V, TK, BV).to(tl.float32)
            for m in range(num_merges(i, rel)):
                z_left, left = z - (1 << (shift + m)), row - (1 << (shift + m))
                block, through, exists = slots + (left * H + h) * SIZE, rights + (left * H + h) * (K * K), z_left >= z0
                if NODES:
                    node = node_row(z_left, z0, sequence, cap)
                    block = tl.where(exists, block, nodes + (node * H + h) * SIZE)
                    through = tl.where(exists, through, transitions + (row * H + h) * (K * K))
                    exists = exists | (node >= 0)
                if exists:
                    for s in range(0, K, TK):
                        right_TT = load_block(through, t * TK, s, K, K, TK, TK, z)
                        left_TV = load_block(block, s, tile * BV, K, V, TK, BV, z)
                        state = tl.dot(right_TT, left_TV, state, input_precision=PRECISION)
            store_block(slot, t * TK, tile * BV, state, K, V, TK, BV, z)

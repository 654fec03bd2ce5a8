"""The Fenwick array of transitions and states, one storey (four levels, 16 entries) at a time.

    own:      W = Ab diag(exp(G)) K,  U = Ab V,  Kd = diag(exp(Gam - G)) K
              P_z = exp(Gam) I - Kd^T W          S_z = Kd^T U
    merge:    P_block = P_right P_left           S_block = P_right S_left + S_right

An entry of storey s is a chunk e with e + 1 a multiple of 16**s; it stands for the 16**s chunks that end there. From the
cap on, blocks merge with the prefix of their run. One program takes the entries of a run in order, each with all blocks
on its left: first the transitions, then, for tiles of V on their own, the states. Each block is the left one of at most
one merge: `rights`, at its row, keeps P_right of that merge for the states and for the backward.
"""

# C chunk, H heads, K key, V value
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import (
    BITS,
    RUN,
    copy,
    entry_bits,
    levels_below,
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
    store_block,
)


@triton.jit
def run_entries(number, count, z0, storey):
    """The first and the last + 1 entry, from 1, of a run that exist: their chunks lie in z0 .. count - 1."""
    before, shift = number * RUN, entry_bits(storey)
    return tl.maximum((z0 >> shift) - before, 0) + 1, tl.minimum((count >> shift) - before, RUN) + 1


@triton.jit
def own_transition(
    k_rows, k_t, n, G, write_CC, out,
    K: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P_z into memory."""
    i, x = tl.arange(0, C), tl.arange(0, TK)
    total = tl.sum(tl.where(i == C - 1, G, 0.0), 0)
    for column in range(0, K, TK):
        incoming_CT = load_rows(k_rows, k_t, n, column, C, K, TK).to(tl.float32) * tl.exp2(G)[:, None]
        written_CT = tl.dot(write_CC, incoming_CT.to(DOT), input_precision=PRECISION).to(DOT)
        for row in range(0, K, TK):
            outgoing_CT = load_rows(k_rows, k_t, n, row, C, K, TK).to(tl.float32) * tl.exp2(total - G)[:, None]
            tile = -tl.dot(tl.trans(outgoing_CT.to(DOT)), written_CT, input_precision=PRECISION)
            tile += tl.where((row + x)[:, None] == (column + x)[None, :], tl.exp2(total), 0.0)
            store_block(out, row, column, tile, K, K, TK, TK)


@triton.jit(do_not_specialize=SIZES)
def transition_sweep_kernel(
    k, beta, inverse, cumulative, transitions, rights, table, runs,
    T, N, H, R, cap, storey,
    k_b, k_t, k_h, beta_b, beta_t, beta_h,
    K: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, OWN: tl.constexpr,
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
        merges = num_merges(i, rel)
        # The first of the merges whose left block is a transition, and not a node: there are `real` of them.
        real = tl.zeros([], tl.int32)
        for m in range(merges):
            real += (z - (1 << (shift + m)) >= z0).to(tl.int32)
        left = row - (1 << shift)
        source = tl.where(real > 0, rights + (left * H + h) * SIZE, slot)
        if OWN:
            b, first, end, z_, z0_, sequence_ = locate(row, table, T, N, C, PACKED)
            n = tl.minimum(end - first, C).to(tl.int32)
            G = tl.load(cumulative + (row * H + h) * C + tl.arange(0, C))
            write_CC = load_write(
                inverse + (row * H + h) * (C * C), beta + b * beta_b + first * beta_t + h * beta_h, beta_t, n, C, DOT
            )
            k_rows = k + b * k_b + first * k_t + (h // R) * k_h
            own_transition(k_rows, k_t, n, G, write_CC, source, K, C, TK, DOT, PRECISION)
        elif real > 0:
            copy(slot, source, K, TK)
        for m in range(real):
            left = row - (1 << (shift + m))
            farther = row - (1 << (shift + m + 1))
            target = tl.where(m + 1 < real, rights + (farther * H + h) * SIZE, slot)
            multiply(source, transitions + (left * H + h) * SIZE, target, K, TK, PRECISION)
            source = target


@triton.jit(do_not_specialize=SIZES)
def state_sweep_kernel(
    k, v, beta, inverse, cumulative, transitions, rights, slots, nodes, table, runs,
    T, N, H, R, cap, storey,
    k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr, OWN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
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
        merges = num_merges(i, rel)
        if OWN:
            b, first, end, z_, z0_, sequence_ = locate(row, table, T, N, C, PACKED)
            n = tl.minimum(end - first, C).to(tl.int32)
            x = tl.arange(0, C)
            G = tl.load(cumulative + (row * H + h) * C + x)
            total = tl.sum(tl.where(x == C - 1, G, 0.0), 0)
            write_CC = load_write(
                inverse + (row * H + h) * (C * C), beta + b * beta_b + first * beta_t + h * beta_h, beta_t, n, C, DOT
            )
            v_CV = load_rows(v + b * v_b + first * v_t + h * v_h, v_t, n, tile * BV, C, V, BV).to(DOT)
            written_CV = tl.dot(write_CC, v_CV, input_precision=PRECISION).to(DOT)
        for kt in range(0, K, TK):
            if OWN:
                k_rows = k + b * k_b + first * k_t + (h // R) * k_h
                outgoing_CT = load_rows(k_rows, k_t, n, kt, C, K, TK).to(tl.float32) * tl.exp2(total - G)[:, None]
                state = tl.dot(tl.trans(outgoing_CT.to(DOT)), written_CV, input_precision=PRECISION)
            else:
                state = load_block(slot, kt, tile * BV, K, V, TK, BV).to(tl.float32)
            tl.debug_barrier()  # what the left blocks got from this program is seen
            for m in range(merges):
                z_left = z - (1 << (shift + m))
                left = row - (1 << (shift + m))
                block, through, exists = slots + (left * H + h) * SIZE, rights + (left * H + h) * (K * K), z_left >= z0
                if NODES:
                    node = node_row(z_left, z0, sequence, cap)
                    block = tl.where(exists, block, nodes + (node * H + h) * SIZE)
                    through = tl.where(exists, through, transitions + (row * H + h) * (K * K))
                    exists = exists | (node >= 0)
                if exists:
                    for s in range(0, K, TK):
                        right_TT = load_block(through, kt, s, K, K, TK, TK)
                        left_TV = load_block(block, s, tile * BV, K, V, TK, BV)
                        state = tl.dot(right_TT, left_TV, state, input_precision=PRECISION)
            store_block(slot, kt, tile * BV, state, K, V, TK, BV)

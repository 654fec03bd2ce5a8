"""The adjoint of the sweeps, from the last storey to the first.

    S_block = P_right S_left + S_right:   dS_left += P_right^T dS,   dS_right = dS
    P_block = P_right P_left:             dP_left += P_right^T dP,   dP_right = dP P_left^T + dS S_left^T

One program takes the entries of a run from the last to the first, each with its merges from the last to the first: a
block's own merge into its parent is behind it then. First the states, then the transitions, which need all of V.
"""

# H heads, K key, V value
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.tiles import copy, node_row, num_merges
from loglinear.kernels.triton.delta_rule.up_sweep import run_entries
from loglinear.kernels.triton.tiles import SIZES, head_program, load_block, store_block


@triton.jit
def add_through(
    out, transition, dstate, column, K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out += P^T dS, one tile of columns, in memory."""
    for t in range(0, K, TK):
        total = load_block(out, t, column, K, V, TK, BV).to(tl.float32)
        for s in range(0, K, TK):
            block_TT = load_block(transition, s, t, K, K, TK, TK)
            dstate_TV = load_block(dstate, s, column, K, V, TK, BV)
            total = tl.dot(tl.trans(block_TT), dstate_TV, total, input_precision=PRECISION)
        store_block(out, t, column, total, K, V, TK, BV)


@triton.jit(do_not_specialize=SIZES)
def state_down_sweep_kernel(
    transitions, rights, dslots, dnodes, runs,
    N, H, cap, storey,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One run, one head, one tile of V: dslots [chunk, H, K, V] in place; adds to dnodes."""
    SIZE: tl.constexpr = K * V
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, run = head_program(TILES, H)
    origin, before, start, stop, shift, rel, z0, sequence = run_entries(run, runs, N, cap, storey, PACKED)
    for step in range(stop - start):
        i = stop - 1 - step
        z = ((before + i) << shift) - 1
        row = origin + z
        dstate = dslots + (row * H + h) * SIZE
        tl.debug_barrier()
        for m in range(num_merges(i, rel)):
            z_left, left = z - (1 << (shift + m)), row - (1 << (shift + m))
            out, through, exists = dslots + (left * H + h) * SIZE, rights + (left * H + h) * (K * K), z_left >= z0
            if exists:
                add_through(out, through, dstate, tile * BV, K, V, TK, BV, PRECISION)
            elif NODES:
                node = node_row(z_left, z0, sequence, cap)
                if node >= 0:
                    own = transitions + (row * H + h) * (K * K)
                    add_through(dnodes + (node * H + h) * SIZE, own, dstate, tile * BV, K, V, TK, BV, PRECISION)


@triton.jit
def add_states(
    total, dstate, state, row, column,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + the [TK, TK] tile of dS S^T."""
    for x in range(0, V, BV):
        dstate_TV = load_block(dstate, row, x, K, V, TK, BV)
        state_TV = load_block(state, column, x, K, V, TK, BV)
        total = tl.dot(dstate_TV, tl.trans(state_TV), total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=SIZES)
def transition_down_sweep_kernel(
    transitions, rights, slots, nodes, dtransitions, dslots, runs,
    N, H, cap, storey,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One run, one head: dtransitions [chunk, H, K, K] in place, with the dslots that `state_down_sweep` left; uses up
    rights."""
    SIZE: tl.constexpr = K * K
    _, h, run = head_program(1, H)
    origin, before, start, stop, shift, rel, z0, sequence = run_entries(run, runs, N, cap, storey, PACKED)
    for step in range(stop - start):
        i = stop - 1 - step
        z = ((before + i) << shift) - 1
        row = origin + z
        own = dtransitions + (row * H + h) * SIZE
        dstate = dslots + (row * H + h) * (K * V)
        source, has_moved = own, i < 0
        merges = num_merges(i, rel)
        tl.debug_barrier()
        for later in range(merges):
            m = merges - 1 - later
            z_left, left = z - (1 << (shift + m)), row - (1 << (shift + m))
            if z_left >= z0:
                right, dleft = rights + (left * H + h) * SIZE, dtransitions + (left * H + h) * SIZE
                for t in range(0, K, TK):
                    for j in range(0, K, TK):
                        total = load_block(dleft, t, j, K, K, TK, TK).to(tl.float32)
                        for s in range(0, K, TK):
                            right_TT = load_block(right, s, t, K, K, TK, TK)
                            total = tl.dot(
                                tl.trans(right_TT), load_block(source, s, j, K, K, TK, TK), total,
                                input_precision=PRECISION,
                            )  # fmt: skip
                        store_block(dleft, t, j, total, K, K, TK, TK)
                tl.debug_barrier()  # P_right has been used: its place takes its gradient
                block, state = transitions + (left * H + h) * SIZE, slots + (left * H + h) * (K * V)
                for t in range(0, K, TK):
                    for j in range(0, K, TK):
                        total = add_states(tl.zeros([TK, TK], tl.float32), dstate, state, t, j, K, V, TK, BV, PRECISION)
                        for s in range(0, K, TK):
                            source_TT = load_block(source, t, s, K, K, TK, TK)
                            block_TT = load_block(block, j, s, K, K, TK, TK)
                            total = tl.dot(source_TT, tl.trans(block_TT), total, input_precision=PRECISION)
                        store_block(right, t, j, total, K, K, TK, TK)
                tl.debug_barrier()
                source, has_moved = right, i > 0
            elif NODES:
                node = node_row(z_left, z0, sequence, cap)
                if node >= 0:
                    for t in range(0, K, TK):
                        for j in range(0, K, TK):
                            total = load_block(own, t, j, K, K, TK, TK).to(tl.float32)
                            total = add_states(
                                total, dstate, nodes + (node * H + h) * (K * V), t, j, K, V, TK, BV, PRECISION
                            )
                            store_block(own, t, j, total, K, K, TK, TK)
                    tl.debug_barrier()
        if has_moved:
            copy(source, own, K, TK)

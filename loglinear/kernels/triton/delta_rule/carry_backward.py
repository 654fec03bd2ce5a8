"""What was carried to the runs and to the ends, differentiated.

    R = Y S_block,  Y' = Y P_block:     dY = dR S_block^T + dY' P_block^T
                                        dS_block += Y^T dR,   dP_block += Y^T dY'

dY is computed by each carrier for itself, from the farthest block to the nearest; then each block sums over the
carriers that read it.
"""

# H heads, K key, V value, l candidate read
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.carry import carrier
from loglinear.kernels.triton.delta_rule.tiles import BITS, RUN, column_of_read, count_bits, reads_of
from loglinear.kernels.triton.tiles import SIZES, exponent, head_program, load_block, locate_run, store_block
from loglinear.kernels.triton.walks import nearest, reader_level, slot_pointer


@triton.jit(do_not_specialize=SIZES)
def carry_paths_backward_kernel(
    transitions, slots, nodes, dcarried, dpaths, runs, ends,
    T, N, H, cap, columns, candidates,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr, ENDS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One carrier, one head: dY of each candidate but the nearest, dpaths [carrier, candidate, H, K, K]."""
    LOW: tl.constexpr = 0 if ENDS else BITS
    _, h, number = head_program(1, H)
    origin, z, z0, sequence = carrier(number, runs, ends, T, N, C, PACKED, ENDS)
    remaining = reads_of(z, z0, cap)
    dpaths += (number.to(tl.int64) * candidates * H + h) * (K * K)
    dcarried += (number.to(tl.int64) * columns * H + h) * (K * V)
    beyond = dpaths
    for step in range(count_bits(remaining) - 1):
        l = exponent(remaining)
        remaining -= 1 << l
        target = dpaths + (l - LOW).to(tl.int64) * H * (K * K)
        dstate = dcarried + column_of_read(l, cap, LOW).to(tl.int64) * H * (K * V)
        slot = slot_pointer(slots, nodes, origin + z, z, z0, sequence, l, cap, h, H, K * V, NODES)
        block_end = (z >> l) << l
        block = transitions + ((origin + block_end - 1) * H + h) * (K * K)
        tl.debug_barrier()
        for i in range(0, K, TK):
            for j in range(0, K, TK):
                total = tl.zeros([TK, TK], tl.float32)
                for column in range(0, V, BV):
                    dstate_TV = load_block(dstate, i, column, K, V, TK, BV).to(DOT)
                    state_TV = load_block(slot, j, column, K, V, TK, BV)
                    total = tl.dot(dstate_TV, tl.trans(state_TV), total, input_precision=PRECISION)
                if step > 0:
                    if block_end <= z0:
                        total += load_block(beyond, i, j, K, K, TK, TK).to(tl.float32)
                    else:
                        for s in range(0, K, TK):
                            beyond_TT = load_block(beyond, i, s, K, K, TK, TK)
                            block_TT = load_block(block, j, s, K, K, TK, TK)
                            total = tl.dot(beyond_TT, tl.trans(block_TT), total, input_precision=PRECISION)
                store_block(target, i, j, total, K, K, TK, TK)
        beyond = target


@triton.jit
def from_carrier(
    total, paths, dpaths, dcarried, number, reads, l, cap, h, H, columns, candidates, row, column,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr, LOW: tl.constexpr,
    TRANSITION: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + the tile of Y^T dR, or with TRANSITION of Y^T dY', of what one carrier read as candidate l."""
    if TRANSITION:
        farther = reads >> (l + 1) << (l + 1)
        gradient = dpaths + ((number.to(tl.int64) * candidates + nearest(farther) - LOW) * H + h) * (K * K)
        exists = farther > 0
    else:
        gradient = dcarried + ((number.to(tl.int64) * columns + column_of_read(l, cap, LOW)) * H + h) * (K * V)
        exists = l >= 0
    if exists:
        if l == nearest(reads):
            total += load_block(gradient, row, column, K, V, TK, BV).to(tl.float32)
        else:
            path = paths + ((number.to(tl.int64) * candidates + l - LOW) * H + h) * (K * K)
            for s in range(0, K, TK):
                path_TT = load_block(path, s, row, K, K, TK, TK)
                gradient_TV = load_block(gradient, s, column, K, V, TK, BV).to(DOT)
                total = tl.dot(tl.trans(path_TT), gradient_TV, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=SIZES)
def carry_backward_kernel(
    paths, dpaths, dcarried, dslots, runs,
    N, H, cap, columns, candidates,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    TRANSITION: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The slot at the end of one run, one head, one [TK, BV] tile of [K, V]: the sum over the runs that were given it.
    TRANSITION: of its transition, V is K then."""
    ROWS: tl.constexpr = (K + TK - 1) // TK
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, run = head_program(ROWS * TILES, H)
    origin, count, number, z0, sequence = locate_run(run, runs, N, 0, PACKED, BITS)
    z = number * RUN + RUN - 1
    if z >= count:
        return
    l = reader_level(z, cap, BITS)
    readers = tl.minimum(1 << (tl.minimum(l, 30) - BITS), (count + RUN - 1) // RUN - 1 - number)
    total = tl.zeros([TK, BV], tl.float32)
    for reader in range(1, readers + 1):
        reads = reads_of((number + reader) * RUN, z0, cap)
        total = from_carrier(
            total, paths, dpaths, dcarried, run + reader, reads, l, cap, h, H, columns, candidates,
            tile // TILES * TK, tile % TILES * BV, K, V, TK, BV, BITS, TRANSITION, DOT, PRECISION,
        )  # fmt: skip
    out = dslots + ((origin + z) * H + h) * (K * V)
    store_block(out, tile // TILES * TK, tile % TILES * BV, total, K, V, TK, BV)


@triton.jit(do_not_specialize=SIZES)
def carried_nodes_backward_kernel(
    paths, dpaths, dcarried, dnodes, runs, ends, first_runs,
    N, H, cap, columns, candidates,
    K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Node m of one sequence where runs were given it, one head, one [TK, BV] tile; adds to dnodes."""
    ROWS: tl.constexpr = (K + TK - 1) // TK
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, part = head_program(ROWS * TILES, H)
    m, sequence = part % (cap + 1), part // (cap + 1)
    z0, shift = tl.load(ends + sequence * 3 + 2), tl.minimum(m, 31)
    node_end = (z0 >> shift) << shift
    exists = tl.where(m < cap, (z0 >> shift) & 1, (node_end > 0).to(tl.int32))
    if exists == 0:
        return
    l = reader_level(node_end - 1, cap, BITS)
    run = tl.load(first_runs + sequence).to(tl.int32)
    origin, count, number, z0_, sequence_ = locate_run(run, runs, N, 0, PACKED, BITS)
    if (l < BITS) | (sequence_ != sequence):
        return
    last = tl.minimum((node_end + (1 << tl.minimum(l, 30))) >> BITS, (count + RUN - 1) // RUN)
    total = tl.zeros([TK, BV], tl.float32)
    for reader in range(last - number):
        reads = reads_of((number + reader) * RUN, z0, cap)
        total = from_carrier(
            total, paths, dpaths, dcarried, run + reader, reads, l, cap, h, H, columns, candidates,
            tile // TILES * TK, tile % TILES * BV, K, V, TK, BV, BITS, False, DOT, PRECISION,
        )  # fmt: skip
    out = dnodes + ((sequence.to(tl.int64) * (cap + 1) + m) * H + h) * (K * V)
    total += load_block(out, tile // TILES * TK, tile % TILES * BV, K, V, TK, BV).to(tl.float32)
    store_block(out, tile // TILES * TK, tile % TILES * BV, total, K, V, TK, BV)


@triton.jit(do_not_specialize=SIZES)
def ends_backward_kernel(
    paths, dpaths, dcarried, dslots, dnodes, ends,
    T, N, H, cap, columns, candidates,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr,
    TRANSITION: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One candidate of the walk from one sequence's end, one head, one [TK, BV] tile; adds to dslots or dnodes."""
    ROWS: tl.constexpr = (K + TK - 1) // TK
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, part = head_program(ROWS * TILES, H)
    l, number = part % candidates, part // candidates
    origin, z, z0, sequence = carrier(number, ends, ends, T, N, C, PACKED, True)
    reads = reads_of(z, z0, cap)
    block_end = (z >> l) << l
    is_node = block_end <= z0
    if ((reads >> l) & 1 == 0) | (is_node & TRANSITION):
        return
    total = from_carrier(
        tl.zeros([TK, BV], tl.float32), paths, dpaths, dcarried, number, reads, l, cap, h, H, columns, candidates,
        tile // TILES * TK, tile % TILES * BV, K, V, TK, BV, 0, TRANSITION, DOT, PRECISION,
    )  # fmt: skip
    out = dslots + ((origin + block_end - 1) * H + h) * (K * V)
    if is_node:
        if NODES:
            node = dnodes + ((sequence.to(tl.int64) * (cap + 1) + tl.minimum(l, cap)) * H + h) * (K * V)
            total += load_block(node, tile // TILES * TK, tile % TILES * BV, K, V, TK, BV).to(tl.float32)
            store_block(node, tile // TILES * TK, tile % TILES * BV, total, K, V, TK, BV)
    else:
        total += load_block(out, tile // TILES * TK, tile % TILES * BV, K, V, TK, BV).to(tl.float32)
        store_block(out, tile // TILES * TK, tile % TILES * BV, total, K, V, TK, BV)

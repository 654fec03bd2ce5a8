"""The reads between chunks, differentiated on the states' side.

    dS_slot = sum over its readers z of (Q_z diag(lambda_l exp(G) P_path))^T dO_z

The readers of a slot of 2**l chunks are as many chunks behind it, with a larger radix several times as many. Those of
slots smaller than a run of the sweep, of 64 chunks, are gathered by one program; more are gathered in such runs, whose
sums are added up in order.
"""

# C chunk, H heads, K key, V value, L levels
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from loglinear.kernels.triton.args import SIZES, Chunk, Rows, Sizes
from loglinear.kernels.triton.compiler import prefetched
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import Launch, ceil_div
from loglinear.kernels.triton.levels import load_scale
from loglinear.kernels.triton.scalar_gate.states import ELEMENTS, Inputs, Reads, StateGradients, States
from loglinear.kernels.triton.tiles import head_program, load_rows, load_state, locate, locate_run, store_state
from loglinear.kernels.triton.walks import (
    block_row,
    count_readers,
    end_of,
    first_reader,
    height_of,
    prefix_end,
    reader_at,
    walk,
)


class Reader(NamedTuple):
    """One reader of a slot: lambda and G of its tokens, the path from the slot, and the gradient of the log decays
    beyond the slot, for each half."""

    scales: tl.tensor
    G: tl.tensor
    path: tl.tensor
    beyond_0: tl.tensor
    beyond_1: tl.tensor


@triton.jit
def load_reader(
    scales,
    l_t,
    L,
    cumulative,
    reads,
    c,
    first,
    end,
    l,
    h,
    H,
    C: tl.constexpr,
    HALVES: tl.constexpr,
    TREE: tl.constexpr,
):
    """Nothing is computed with its numbers here: that would wait for them."""
    READS: tl.constexpr = TREE.reads
    i, n = tl.arange(0, C), tl.minimum(end - first, C).to(tl.int32)
    G = tl.load(cumulative + (c * H + h) * C + i, mask=i < n, other=0.0)
    path = tl.load(reads.paths + (c * H + h) * READS + l, mask=n > 0, other=0.0)
    beyond_0 = tl.load(reads.beyond + (c * HALVES * H + h) * READS + l, mask=n > 0, other=0.0)
    in_second = n > (C // 2 if HALVES == 2 else C)
    beyond_1 = tl.load(reads.beyond + ((c * HALVES + HALVES - 1) * H + h) * READS + l, mask=in_second, other=0.0)
    return Reader(load_scale(scales + first * l_t, l_t, n, TREE.column + l, L, i), G, path, beyond_0, beyond_1)


@triton.jit
def gather_readers(
    q,
    level_scales,
    do,
    cumulative,
    reads,
    chunk,
    readers,
    l,
    behind,
    h,
    sizes,
    scale,
    first_column,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    HALVES: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Sum over `readers` chunks from `chunk` on, and of the gradients of log decays beyond the slot. The chunk is that
    many chunks `behind` the slot's first reader, which reads it through candidate l."""
    H, b, c, first, end = sizes.H, chunk.b, chunk.c, chunk.first, chunk.end
    scales, l_t, L = level_scales.data + b * level_scales.b + h * level_scales.h, level_scales.t, sizes.L
    q_rows, do_rows = q.data + b * q.b + (h // sizes.R) * q.h, do.data + b * do.b + h * do.h
    dstate_KV = tl.zeros([BK, BV], tl.float32)
    dlog = tl.zeros([], tl.float32)
    readers = tl.minimum(readers, ((end - first + C - 1) // C).to(tl.int32))
    # Vectors are loaded one reader ahead: nothing else would hide their latency.
    stop = tl.where(readers > 0, end, first)
    at = reader_at(behind, l, TREE)
    ahead = load_reader(scales, l_t, L, cumulative, reads, c, first, stop, at, h, H, C, HALVES, TREE)
    for reader in range(readers):
        weight = prefetched(ahead.scales, level_scales.data.dtype.element_ty) * scale * tl.exp2(ahead.G + ahead.path)
        beyond = ahead.beyond_0 + ahead.beyond_1
        stop = tl.where(reader + 1 < readers, end, first)
        at = reader_at(behind + reader + 1, l, TREE)
        ahead = load_reader(scales, l_t, L, cumulative, reads, c + 1, first + C, stop, at, h, H, C, HALVES, TREE)
        n = tl.minimum(end - first, C).to(tl.int32)
        q_CK = load_rows(q_rows + first * q.t, q.t, n, 0, C, K, BK).to(MATH.dot)
        do_CV = load_rows(do_rows + first * do.t, do.t, n, first_column, C, V, BV)
        weighted_CV = (do_CV.to(tl.float32) * weight[:, None]).to(MATH.dot)
        dstate_KV += tl.dot(tl.trans(q_CK), weighted_CV, input_precision=MATH.precision)
        dlog += beyond
        c += 1
        first += C
    return dstate_KV, dlog


@launcher
@triton.jit(do_not_specialize=SIZES)
def state_backward_kernel(
    q,
    level_scales,
    do,
    cumulative,
    reads,
    dslots,
    dlog_decay,
    table,
    runs,
    T,
    N,
    H,
    R,
    L,
    cap,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    HALVES: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    RUNS: tl.constexpr,
    LEVELS: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """RUNS false: the slot of one chunk that is smaller than a run, one head, one tile of V, into dslots [chunk].
    RUNS true: a run of readers through one of the LEVELS candidates of larger slots, into row (run, candidate) of the
    partial sums in dslots and dlog_decay."""
    RUN: tl.constexpr = 1 << TREE.tier
    sizes = Sizes(T, N, H, R, L, cap)
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, task = head_program(TILES, sizes.H)
    if RUNS:
        run = locate_run(task // LEVELS, runs, sizes, 0, TREE)
        if run.number * RUN >= run.count:
            return
        c = run.origin + tl.maximum(run.number * RUN, run.z0)
    else:
        c = task.to(tl.int64)
    chunk = locate(c, table, sizes, C)
    if chunk.end <= chunk.first:
        return
    if RUNS:
        l = task % LEVELS + TREE.run_read
        out_row = task.to(tl.int64)
        read, _, _ = walk(chunk, sizes.cap, TREE)
        if tl.sum((read & (tl.arange(0, TREE.reads) == l)).to(tl.int32), 0) == 0:
            return
        readers = RUN - (chunk.z & (RUN - 1))
    else:
        l = first_reader(chunk.z, sizes.cap, TREE)
        out_row = c
        if l >= TREE.run_read:
            return
        readers = count_readers(chunk.z + 1, l, TREE)
        # The next chunk; its number of tokens is not known.
        x = chunk
        chunk = Chunk(x.c + 1, x.z + 1, x.z0, x.sequence, x.b, x.first + C, x.n, x.end)
    dstate_KV, dlog = gather_readers(
        q,
        level_scales,
        do,
        cumulative,
        reads,
        chunk,
        readers,
        l,
        0,
        h,
        sizes,
        scale,
        tile * BV,
        K,
        V,
        C,
        HALVES,
        BK,
        BV,
        TREE,
        MATH,
    )
    store_state(dslots + (out_row * sizes.H + h) * (K * V), tile * BV, dstate_KV, K, V, BK, BV)
    if tile == 0:
        tl.store(dlog_decay + out_row * sizes.H + h, dlog)


@launcher
@triton.jit(do_not_specialize=SIZES)
def sum_runs_kernel(
    partial,
    dpartial_log,
    dslots,
    dlog_decay,
    runs,
    T,
    N,
    H,
    R,
    L,
    cap,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    LEVELS: tl.constexpr,
    TREE: tl.constexpr,
):
    """The slot at the end of each run of chunks: the sums of its readers' runs, which begin behind it."""
    RUN: tl.constexpr = 1 << TREE.tier
    sizes = Sizes(T, N, H, R, L, cap)
    PARTS: tl.constexpr = (SIZE + E - 1) // E
    part, h, number = head_program(PARTS, sizes.H)
    run = locate_run(number, runs, sizes, 0, TREE)
    z = run.number * RUN + RUN - 1
    if z >= run.count:
        return
    row = run.origin + z
    runs_left = (run.count + RUN - 1) // RUN - 1 - run.number
    l = first_reader(z, sizes.cap, TREE)
    many = count_readers(z + 1, l, TREE) >> TREE.tier
    readers = tl.where(l - TREE.run_read < LEVELS, tl.minimum(many, runs_left), 0)
    x = part * E + tl.arange(0, E)
    total = tl.zeros([E], tl.float32)
    dlog = tl.zeros([], tl.float32)
    for reader in range(1, readers + 1):
        at = reader_at((reader - 1) << TREE.tier, l, TREE) - TREE.run_read
        source = ((number + reader).to(tl.int64) * LEVELS + at) * sizes.H + h
        total += tl.load(partial + source * SIZE + x, mask=x < SIZE, other=0.0)
        dlog += tl.load(dpartial_log + source)
    tl.store(dslots + (row * sizes.H + h) * SIZE + x, total.to(dslots.dtype.element_ty), mask=x < SIZE)
    if part == 0:
        tl.store(dlog_decay + row * sizes.H + h, dlog)


@launcher
@triton.jit(do_not_specialize=SIZES)
def initial_backward_kernel(
    q,
    level_scales,
    do,
    cumulative,
    reads,
    partial,
    dinitial,
    table,
    ends,
    runs,
    first_runs,
    T,
    N,
    H,
    R,
    L,
    cap,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    HALVES: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    LEVELS: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One initial block of one sequence, one head, one tile of V: few readers directly, many by their runs.

    Its readers are the chunks from z0 on whose walk meets its end; first_runs [N] is the run that z0 lies in.
    """
    RUN: tl.constexpr = 1 << TREE.tier
    sizes = Sizes(T, N, H, R, L, cap)
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, block = head_program(TILES, sizes.H)
    m, sequence = block % (cap + 1), block // (cap + 1)
    z0 = tl.load(ends + sequence * 3 + 2)
    dstate_KV = tl.zeros([BK, BV], tl.float32)
    is_block = ((z0 >> height_of(m, TREE)) & TREE.others) > m % TREE.others
    end = tl.where(m < cap, end_of(z0, m, TREE), prefix_end(z0, cap, TREE))
    if tl.where(m < cap, is_block, end > 0):
        l = first_reader(end - 1, cap, TREE)
        behind_all = end + count_readers(end, l, TREE)
        if l < TREE.run_read:
            chunk = locate(tl.load(ends + sequence * 3).to(tl.int64) + z0, table, sizes, C)
            readers = behind_all - z0
            if (chunk.end > chunk.first) & (chunk.sequence == sequence):
                dstate_KV, _ = gather_readers(
                    q,
                    level_scales,
                    do,
                    cumulative,
                    reads,
                    chunk,
                    readers,
                    l,
                    z0 - end,
                    h,
                    sizes,
                    scale,
                    tile * BV,
                    K,
                    V,
                    C,
                    HALVES,
                    BK,
                    BV,
                    TREE,
                    MATH,
                )
        else:
            first_run = tl.load(first_runs + sequence)
            run = locate_run(first_run, runs, sizes, 0, TREE)
            runs_left = (run.count + RUN - 1) // RUN - run.number
            readers = tl.minimum((behind_all >> TREE.tier) - run.number, runs_left)
            for reader in range(tl.where(run.sequence == sequence, readers, 0)):
                at = reader_at(((run.number + reader) << TREE.tier) - end, l, TREE) - TREE.run_read
                source = ((first_run + reader).to(tl.int64) * LEVELS + at) * sizes.H + h
                dstate_KV += load_state(partial + source * (K * V), tile * BV, K, V, BK, BV)
    out = dinitial + block_row(sequence, m, sizes, h) * (K * V)
    store_state(out, tile * BV, dstate_KV, K, V, BK, BV)


def state_backward(x: Inputs, states: States, do: Rows, reads: Reads, launch: Launch) -> StateGradients:
    """The gradients of the array's slots by their readers, and of the initial blocks."""
    y, H, tiles, levels = x.layout, x.heads, x.value_tiles(launch), max(1, x.layout.run_reads)
    dinitial = None if states.initial is None else torch.zeros_like(states.initial, dtype=torch.float32)
    dstates = StateGradients(torch.empty_like(states.slots), dinitial, x.empty(y.chunks, H))
    gathered = (x.q, x.level_scales, do, states.cumulative, reads)
    constants = dict(HALVES=x.halves, TREE=x.tree, **x.constants(launch))
    state_backward_kernel[(y.chunks * H * tiles,)](
        *gathered, dstates.slots, dstates.log_decay, y.table, None, *x.sizes, x.scale, RUNS=False, LEVELS=1, **constants
    )
    partial = None
    if y.chunks_per_row >= 1 << x.tree.tier or dinitial is not None:
        partial = x.empty(y.runs[0] * levels, H, x.key_dim, x.value_dim)
        dpartial_log = x.empty(y.runs[0] * levels, H)
        runs = y.run_tables[0]
        state_backward_kernel[(y.runs[0] * levels * H * tiles,)](
            *gathered, partial, dpartial_log, y.table, runs, *x.sizes, x.scale, RUNS=True, LEVELS=levels, **constants
        )
        sum_runs_kernel[(y.runs[0] * H * ceil_div(x.state_size, ELEMENTS),)](
            partial,
            dpartial_log,
            dstates.slots,
            dstates.log_decay,
            runs,
            *x.sizes,
            SIZE=x.state_size,
            E=ELEMENTS,
            LEVELS=levels,
            TREE=x.tree,
        )
    if dinitial is not None:
        initial_backward_kernel[(y.sequences * (x.sizes.cap + 1) * H * tiles,)](
            *gathered,
            partial,
            dinitial,
            y.table,
            y.ends,
            y.run_tables[0],
            y.first_runs,
            *x.sizes,
            x.scale,
            LEVELS=levels,
            **constants,
        )
    return dstates

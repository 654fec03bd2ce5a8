"""The reads between chunks, differentiated on the states' side.

    dS_slot = sum over its readers z of (Q_z diag(lambda_l exp(G) P_path))^T dO_z        (readers.py)

The readers of a slot of 2**l chunks are as many chunks behind it, with a larger radix several times as many. Those of
slots smaller than a run of the sweep, of 64 chunks, are gathered by one program; more are gathered in such runs, whose
sums are added up in order.
"""

# C chunk, H heads, K key, V value, L levels
import torch
import triton
import triton.language as tl

from loglinear.kernels.triton.args import SIZES, Chunk, Rows, Sizes
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import Launch, ceil_div
from loglinear.kernels.triton.scalar_gate.readers import gather_readers
from loglinear.kernels.triton.scalar_gate.states import Flows, Inputs, Reads, StateGradients, States
from loglinear.kernels.triton.tiles import head_program, load_state, locate, locate_run, store_state
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
        if cumulative is None:
            channel = tl.arange(0, BK)
            tl.store(dlog_decay + (out_row * sizes.H + h) * K + channel, dlog, mask=channel < K)
        else:
            tl.store(dlog_decay + out_row * sizes.H + h, dlog)


@launcher
@triton.jit(do_not_specialize=SIZES)
def sum_runs_kernel(
    partial,
    dpartial_log,
    run_totals,
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
    """The slot at the end of each run of chunks: the sums of its readers' runs, which begin behind it.

    run_totals: at the end of each run its log decay, where the sums are those for the start of their run; else None."""
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
    dlog, path = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    for reader in range(1, readers + 1):
        at = reader_at((reader - 1) << TREE.tier, l, TREE) - TREE.run_read
        source = ((number + reader).to(tl.int64) * LEVELS + at) * sizes.H + h
        read = tl.load(partial + source * SIZE + x, mask=x < SIZE, other=0.0)
        if run_totals is not None:
            read *= tl.exp2(path)
            end_of_run = row + reader * RUN
            path += tl.load(run_totals + end_of_run * sizes.H + h, mask=z + reader * RUN < run.count, other=0.0)
        total += read
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
            path_K = tl.zeros([BK], tl.float32)
            for reader in range(tl.where(run.sequence == sequence, readers, 0)):
                at = reader_at(((run.number + reader) << TREE.tier) - end, l, TREE) - TREE.run_read
                source = ((first_run + reader).to(tl.int64) * LEVELS + at) * sizes.H + h
                read_KV = load_state(partial + source * (K * V), tile * BV, K, V, BK, BV)
                if cumulative is None:
                    read_KV *= tl.exp2(path_K)[:, None]
                    z, channel = ((run.number + reader + 1) << TREE.tier) - 1, tl.arange(0, BK)
                    log_run = reads.run_totals + ((run.origin + z) * sizes.H + h) * K + channel
                    path_K += tl.load(log_run, mask=channel < tl.where(z < run.count, K, 0), other=0.0)
                dstate_KV += read_KV
    out = dinitial + block_row(sequence, m, sizes, h) * (K * V)
    store_state(out, tile * BV, dstate_KV, K, V, BK, BV)


def state_backward(x: Inputs, states: States, do: Rows, reads: Reads | Flows, launch: Launch) -> StateGradients:
    """The gradients of the array's slots by their readers, and of the initial blocks. `Flows` of a diagonal gate."""
    y, H, tiles, levels = x.layout, x.heads, x.value_tiles(launch), max(1, x.layout.run_reads)
    dinitial = None if states.initial is None else torch.zeros_like(states.initial, dtype=torch.float32)
    sizes, size = x.parts
    dstates = StateGradients(torch.empty_like(states.slots), dinitial, torch.empty_like(states.log_decay))
    gathered = (x.q, x.level_scales, do, states.cumulative, reads)
    constants = dict(HALVES=x.halves, TREE=x.tree, **x.constants(launch))
    state_backward_kernel[(y.chunks * H * tiles,)](
        *gathered, dstates.slots, dstates.log_decay, y.table, None, *x.sizes, x.scale, RUNS=False, LEVELS=1, **constants
    )
    partial = None
    if y.chunks_per_row >= 1 << x.tree.tier or dinitial is not None:
        partial = x.empty(y.runs[0] * levels, H, x.key_dim, x.value_dim)
        dpartial_log = x.empty(y.runs[0] * levels, sizes.H)
        runs = y.run_tables[0]
        state_backward_kernel[(y.runs[0] * levels * H * tiles,)](
            *gathered, partial, dpartial_log, y.table, runs, *x.sizes, x.scale, RUNS=True, LEVELS=levels, **constants
        )
        sum_runs_kernel[(y.runs[0] * sizes.H * ceil_div(size, x.elements),)](
            partial,
            dpartial_log,
            reads.run_totals if isinstance(reads, Flows) else None,
            dstates.slots,
            dstates.log_decay,
            runs,
            *sizes,
            SIZE=size,
            E=x.elements,
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

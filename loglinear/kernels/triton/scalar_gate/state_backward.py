"""The reads between chunks, differentiated on the states' side.

    dS_slot = sum over its readers z of (Q_z diag(lambda_l exp(G) P_path))^T dO_z

The readers of a slot are the 2**l chunks behind it. Up to 32 of them are gathered by one program; more are gathered
in runs of 64, whose sums are added up in order.
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
from loglinear.kernels.triton.tiles import (
    RUN,
    TIER,
    head_program,
    load_rows,
    load_state,
    locate,
    locate_run,
    store_state,
)
from loglinear.kernels.triton.walks import READS, reader_level, walk


class Reader(NamedTuple):
    """One reader of a slot: lambda and G of its tokens, the path from the slot, and the gradient of the log decays
    beyond the slot, for each half."""

    scales: tl.tensor
    G: tl.tensor
    path: tl.tensor
    beyond_0: tl.tensor
    beyond_1: tl.tensor


@triton.jit
def load_reader(scales, l_t, cumulative, reads, c, first, end, l, h, H, C: tl.constexpr, HALVES: tl.constexpr):
    """Nothing is computed with its numbers here: that would wait for them."""
    i, n = tl.arange(0, C), tl.minimum(end - first, C).to(tl.int32)
    G = tl.load(cumulative + (c * H + h) * C + i, mask=i < n, other=0.0)
    path = tl.load(reads.paths + (c * H + h) * READS + l, mask=n > 0, other=0.0)
    beyond_0 = tl.load(reads.beyond + (c * HALVES * H + h) * READS + l, mask=n > 0, other=0.0)
    in_second = n > (C // 2 if HALVES == 2 else C)
    beyond_1 = tl.load(reads.beyond + ((c * HALVES + HALVES - 1) * H + h) * READS + l, mask=in_second, other=0.0)
    return Reader(load_scale(scales + first * l_t, l_t, n, 0, 1, i), G, path, beyond_0, beyond_1)


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
    h,
    sizes,
    scale,
    first_column,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LOG_C: tl.constexpr,
    HALVES: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    MATH: tl.constexpr,
):
    """Sum over `readers` chunks from `chunk` on, and of the gradients of log decays beyond the slot."""
    H, b, c, first, end = sizes.H, chunk.b, chunk.c, chunk.first, chunk.end
    scales = level_scales.data + b * level_scales.b + h * level_scales.h + tl.minimum(LOG_C + 1 + l, sizes.L - 1)
    q_rows, do_rows = q.data + b * q.b + (h // sizes.R) * q.h, do.data + b * do.b + h * do.h
    dstate_KV = tl.zeros([BK, BV], tl.float32)
    dlog = tl.zeros([], tl.float32)
    readers = tl.minimum(readers, ((end - first + C - 1) // C).to(tl.int32))
    # Vectors are loaded one reader ahead: nothing else would hide their latency.
    stop = tl.where(readers > 0, end, first)
    ahead = load_reader(scales, level_scales.t, cumulative, reads, c, first, stop, l, h, H, C, HALVES)
    for reader in range(readers):
        weight = prefetched(ahead.scales, level_scales.data.dtype.element_ty) * scale * tl.exp2(ahead.G + ahead.path)
        beyond = ahead.beyond_0 + ahead.beyond_1
        stop = tl.where(reader + 1 < readers, end, first)
        ahead = load_reader(scales, level_scales.t, cumulative, reads, c + 1, first + C, stop, l, h, H, C, HALVES)
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
    LOG_C: tl.constexpr,
    HALVES: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    RUNS: tl.constexpr,
    LEVELS: tl.constexpr,
    MATH: tl.constexpr,
):
    """RUNS false: the slot of one chunk with fewer than 64 readers, one head, one tile of V, into dslots [chunk].
    RUNS true: 64 readers of one level, into row (run, level - 6) of the partial sums in dslots and dlog_decay."""
    sizes = Sizes(T, N, H, R, L, cap)
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, task = head_program(TILES, sizes.H)
    if RUNS:
        run = locate_run(task // LEVELS, runs, sizes, 0)
        if run.number * RUN >= run.count:
            return
        c = run.origin + tl.maximum(run.number * RUN, run.z0)
    else:
        c = task.to(tl.int64)
    chunk = locate(c, table, sizes, C)
    if chunk.end <= chunk.first:
        return
    if RUNS:
        l = task % LEVELS + TIER
        out_row = task.to(tl.int64)
        read, _, _ = walk(chunk, sizes.cap)
        if tl.sum((read & (tl.arange(0, READS) == l)).to(tl.int32), 0) == 0:
            return
        readers = RUN - (chunk.z & (RUN - 1))
    else:
        l = reader_level(chunk.z, sizes.cap)
        out_row = c
        if l >= TIER:
            return
        readers = 1 << l
        chunk = chunk_behind(chunk, C)
    dstate_KV, dlog = gather_readers(
        q,
        level_scales,
        do,
        cumulative,
        reads,
        chunk,
        readers,
        l,
        h,
        sizes,
        scale,
        tile * BV,
        K,
        V,
        C,
        LOG_C,
        HALVES,
        BK,
        BV,
        MATH,
    )
    store_state(dslots + (out_row * sizes.H + h) * (K * V), tile * BV, dstate_KV, K, V, BK, BV)
    if tile == 0:
        tl.store(dlog_decay + out_row * sizes.H + h, dlog)


@triton.jit
def chunk_behind(chunk, C: tl.constexpr):
    """The next chunk of a sequence; its number of tokens is not known."""
    return Chunk(chunk.c + 1, chunk.z + 1, chunk.z0, chunk.sequence, chunk.b, chunk.first + C, chunk.n, chunk.end)


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
):
    """The slot at the end of each run of 64 chunks: the sums of its readers' runs, which begin behind it."""
    sizes = Sizes(T, N, H, R, L, cap)
    PARTS: tl.constexpr = (SIZE + E - 1) // E
    part, h, number = head_program(PARTS, sizes.H)
    run = locate_run(number, runs, sizes, 0)
    z = run.number * RUN + RUN - 1
    if z >= run.count:
        return
    row = run.origin + z
    runs_left = (run.count + RUN - 1) // RUN - 1 - run.number
    l = reader_level(z, sizes.cap)
    readers = tl.where(l - TIER < LEVELS, tl.minimum(1 << (l - TIER), runs_left), 0)
    x = part * E + tl.arange(0, E)
    total = tl.zeros([E], tl.float32)
    dlog = tl.zeros([], tl.float32)
    for reader in range(1, readers + 1):
        source = ((number + reader).to(tl.int64) * LEVELS + l - TIER) * sizes.H + h
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
    LOG_C: tl.constexpr,
    HALVES: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    LEVELS: tl.constexpr,
    MATH: tl.constexpr,
):
    """One initial block of one sequence, one head, one tile of V: few readers directly, many by their runs.

    Its readers are the chunks from z0 on whose walk meets its end; first_runs [N] is the run that z0 lies in.
    """
    sizes = Sizes(T, N, H, R, L, cap)
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, block = head_program(TILES, sizes.H)
    m, sequence = block % (cap + 1), block // (cap + 1)
    z0 = tl.load(ends + sequence * 3 + 2)
    dstate_KV = tl.zeros([BK, BV], tl.float32)
    shift = tl.minimum(m, 31)
    end = (z0 >> shift) << shift
    exists = tl.where(m < cap, (z0 >> shift) & 1, (end > 0).to(tl.int32))
    if exists > 0:
        l = reader_level(end - 1, cap)
        if l < TIER:
            chunk = locate(tl.load(ends + sequence * 3).to(tl.int64) + z0, table, sizes, C)
            readers = end + (1 << l) - z0
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
                    h,
                    sizes,
                    scale,
                    tile * BV,
                    K,
                    V,
                    C,
                    LOG_C,
                    HALVES,
                    BK,
                    BV,
                    MATH,
                )
        else:
            first_run = tl.load(first_runs + sequence)
            run = locate_run(first_run, runs, sizes, 0)
            runs_left = (run.count + RUN - 1) // RUN - run.number
            readers = tl.minimum(((end + (1 << l)) >> TIER) - run.number, runs_left)
            for reader in range(tl.where(run.sequence == sequence, readers, 0)):
                source = ((first_run + reader).to(tl.int64) * LEVELS + l - TIER) * sizes.H + h
                dstate_KV += load_state(partial + source * (K * V), tile * BV, K, V, BK, BV)
    out = dinitial + ((sequence.to(tl.int64) * (cap + 1) + m) * sizes.H + h) * (K * V)
    store_state(out, tile * BV, dstate_KV, K, V, BK, BV)


def state_backward(x: Inputs, states: States, do: Rows, reads: Reads, launch: Launch) -> StateGradients:
    """The gradients of the array's slots by their readers, and of the initial blocks."""
    y, H, tiles, levels = x.layout, x.heads, x.value_tiles(launch), max(1, x.layout.run_levels)
    dinitial = None if states.initial is None else torch.zeros_like(states.initial, dtype=torch.float32)
    dstates = StateGradients(torch.empty_like(states.slots), dinitial, x.empty(y.chunks, H))
    gathered = (x.q, x.level_scales, do, states.cumulative, reads)
    constants = dict(LOG_C=x.log_chunk, HALVES=x.halves, **x.constants(launch))
    state_backward_kernel[(y.chunks * H * tiles,)](
        *gathered, dstates.slots, dstates.log_decay, y.table, None, *x.sizes, x.scale, RUNS=False, LEVELS=1, **constants
    )
    partial = None
    if y.chunks_per_row >= 64 or dinitial is not None:
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

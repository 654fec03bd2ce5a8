"""The reads between chunks, differentiated on the states' side.

    dS_slot = sum over its readers z of (Q_z diag(lambda_l exp(G) P_path))^T dO_z

The readers of a slot are the 2**l chunks behind it. Up to 32 of them are gathered by one program; more are gathered
in runs of 64, whose sums are added up in order.
"""

# C chunk, H heads, K key, V value, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.levels import load_scale
from loglinear.kernels.triton.tiles import (
    RUN,
    SIZES,
    STOREY,
    arrived,
    head_program,
    load_rows,
    load_state,
    locate,
    locate_run,
    store_state,
)
from loglinear.kernels.triton.walks import READS, reader_level, walk


@triton.jit
def load_reader(
    scales, l_t, cumulative, read_paths, beyond, c, first, end, l, h, H, C: tl.constexpr, HALVES: tl.constexpr
):
    """Of one reader: its lambda, the two parts of log2 of the decay from the slot to its tokens, and what flows on
    beyond the slot, for each half. Nothing is computed with them here: that would wait for them."""
    i, n = tl.arange(0, C), tl.minimum(end - first, C).to(tl.int32)
    G = tl.load(cumulative + (c * H + h) * C + i, mask=i < n, other=0.0)
    path = tl.load(read_paths + (c * H + h) * READS + l, mask=n > 0, other=0.0)
    flow_0 = tl.load(beyond + (c * HALVES * H + h) * READS + l, mask=n > 0, other=0.0)
    in_second = n > (C // 2 if HALVES == 2 else C)
    flow_1 = tl.load(beyond + ((c * HALVES + HALVES - 1) * H + h) * READS + l, mask=in_second, other=0.0)
    return load_scale(scales + first * l_t, l_t, n, 0, 1, i), G, path, flow_0, flow_1


@triton.jit
def gather_readers(
    q, scales, cumulative, read_paths, beyond, do,
    c, first, end, readers, l, h, H, scale, q_t, l_t, o_t, first_column,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HALVES: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum over `readers` chunks from c on, whose tokens begin at `first`; and of what flows on to farther blocks."""
    dstate_KV = tl.zeros([BK, BV], tl.float32)
    dlog = tl.zeros([], tl.float32)
    readers = tl.minimum(readers, ((end - first + C - 1) // C).to(tl.int32))
    # Vectors are loaded one reader ahead: nothing else would hide their latency.
    scale_c, G_c, path_c, flow_0_c, flow_1_c = load_reader(
        scales, l_t, cumulative, read_paths, beyond, c, first, tl.where(readers > 0, end, first), l, h, H, C, HALVES
    )
    for reader in range(readers):
        weight, flow = arrived(scale_c, scales.dtype.element_ty) * scale * tl.exp2(G_c + path_c), flow_0_c + flow_1_c
        stop = tl.where(reader + 1 < readers, end, first)
        scale_c, G_c, path_c, flow_0_c, flow_1_c = load_reader(
            scales, l_t, cumulative, read_paths, beyond, c + 1, first + C, stop, l, h, H, C, HALVES
        )
        n = tl.minimum(end - first, C).to(tl.int32)
        q_CK = load_rows(q + first * q_t, q_t, n, 0, C, K, BK).to(DOT)
        do_CV = load_rows(do + first * o_t, o_t, n, first_column, C, V, BV)
        weighted_CV = (do_CV.to(tl.float32) * weight[:, None]).to(DOT)
        dstate_KV += tl.dot(tl.trans(q_CK), weighted_CV, input_precision=PRECISION)
        dlog += flow
        c += 1
        first += C
    return dstate_KV, dlog


@triton.jit(do_not_specialize=SIZES)
def state_backward_kernel(
    q, level_scales, cumulative, read_paths, beyond, do, dslots, dlog_p, table, runs,
    T, N, H, R, L, cap, scale,
    q_b, q_t, q_h, l_b, l_t, l_h, o_b, o_t, o_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, HALVES: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
    RUNS: tl.constexpr, LEVELS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """RUNS false: the slot of one chunk with fewer than 64 readers, one head, one tile of V, into dslots [chunk].
    RUNS true: 64 readers of one level, into row (run, level - 6) of partial sums that dslots and dlog_p then are."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, task = head_program(TILES, H)
    if RUNS:
        l = task % LEVELS + STOREY
        out_row = task.to(tl.int64)
        origin, count, number, z0, sequence = locate_run(task // LEVELS, runs, N, 0, PACKED)
        if number * RUN >= count:
            return
        c = origin + tl.maximum(number * RUN, z0)
    else:
        c = task.to(tl.int64)
        l = 0
        out_row = c
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    if end <= first:
        return
    if RUNS:
        read, _, _ = walk(z, z0, cap)
        if tl.sum((read & (tl.arange(0, READS) == l)).to(tl.int32), 0) == 0:
            return
        readers = RUN - (z & (RUN - 1))
    else:
        l = reader_level(z, cap)
        if l >= STOREY:
            return
        readers = 1 << l
        c += 1
        first += C
    scales = level_scales + b * l_b + h * l_h + tl.minimum(LOG_C + 1 + l, L - 1)
    dstate_KV, dlog = gather_readers(
        q + b * q_b + (h // R) * q_h, scales, cumulative, read_paths, beyond, do + b * o_b + h * o_h,
        c, first, end, readers, l, h, H, scale, q_t, l_t, o_t, tile * BV, K, V, C, HALVES, BK, BV, DOT, PRECISION,
    )  # fmt: skip
    store_state(dslots + (out_row * H + h) * (K * V), tile * BV, dstate_KV, K, V, BK, BV)
    if tile == 0:
        tl.store(dlog_p + out_row * H + h, dlog)


@triton.jit(do_not_specialize=SIZES)
def sum_runs_kernel(
    partial, dpartial_log, dslots, dlog_p, runs,
    N, H, cap,
    SIZE: tl.constexpr, E: tl.constexpr, LEVELS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The slot at the end of each run of 64 chunks: the sums of its readers' runs, which begin behind it."""
    PARTS: tl.constexpr = (SIZE + E - 1) // E
    part, h, run = head_program(PARTS, H)
    origin, count, number, z0, sequence = locate_run(run, runs, N, 0, PACKED)
    z = number * RUN + RUN - 1
    if z >= count:
        return
    row = origin + z
    runs_left = (count + RUN - 1) // RUN - 1 - number
    l = reader_level(z, cap)
    readers = tl.where(l - STOREY < LEVELS, tl.minimum(1 << (l - STOREY), runs_left), 0)
    x = part * E + tl.arange(0, E)
    total = tl.zeros([E], tl.float32)
    dlog = tl.zeros([], tl.float32)
    for reader in range(1, readers + 1):
        source = ((run + reader).to(tl.int64) * LEVELS + l - STOREY) * H + h
        total += tl.load(partial + source * SIZE + x, mask=x < SIZE, other=0.0)
        dlog += tl.load(dpartial_log + source)
    tl.store(dslots + (row * H + h) * SIZE + x, total.to(dslots.dtype.element_ty), mask=x < SIZE)
    if part == 0:
        tl.store(dlog_p + row * H + h, dlog)


@triton.jit(do_not_specialize=SIZES)
def node_backward_kernel(
    q, level_scales, cumulative, read_paths, beyond, do, partial, dnodes, table, ends, runs, first_runs,
    T, N, H, R, L, cap, scale,
    q_b, q_t, q_h, l_b, l_t, l_h, o_b, o_t, o_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, HALVES: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
    LEVELS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The node m of one sequence, one head, one tile of V: readers of few chunks directly, of many by their runs.

    Its readers are the chunks from z0 on whose walk meets its end; first_runs [N] is the run that z0 lies in.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, block = head_program(TILES, H)
    m, sequence = block % (cap + 1), block // (cap + 1)
    z0 = tl.load(ends + sequence * 3 + 2)
    dstate_KV = tl.zeros([BK, BV], tl.float32)
    shift = tl.minimum(m, 31)
    node_end = (z0 >> shift) << shift
    exists = tl.where(m < cap, (z0 >> shift) & 1, (node_end > 0).to(tl.int32))
    if exists > 0:
        l = reader_level(node_end - 1, cap)
        if l < STOREY:
            c = tl.load(ends + sequence * 3).to(tl.int64) + z0
            b, first, end, z, z0_, sequence_ = locate(c, table, T, N, C, PACKED)
            readers = node_end + (1 << l) - z0
            if (end > first) & (sequence_ == sequence):
                scales = level_scales + b * l_b + h * l_h + tl.minimum(LOG_C + 1 + l, L - 1)
                dstate_KV, _ = gather_readers(
                    q + b * q_b + (h // R) * q_h, scales, cumulative, read_paths, beyond, do + b * o_b + h * o_h,
                    c, first, end, readers, l, h, H, scale, q_t, l_t, o_t, tile * BV,
                    K, V, C, HALVES, BK, BV, DOT, PRECISION,
                )  # fmt: skip
        else:
            run = tl.load(first_runs + sequence)
            origin, count, number, z0_, sequence_ = locate_run(run, runs, N, 0, PACKED)
            runs_left = (count + RUN - 1) // RUN - number
            readers = tl.minimum(((node_end + (1 << l)) >> STOREY) - number, runs_left)
            for reader in range(tl.where(sequence_ == sequence, readers, 0)):
                source = ((run + reader).to(tl.int64) * LEVELS + l - STOREY) * H + h
                dstate_KV += load_state(partial + source * (K * V), tile * BV, K, V, BK, BV)
    out = dnodes + ((sequence.to(tl.int64) * (cap + 1) + m) * H + h) * (K * V)
    store_state(out, tile * BV, dstate_KV, K, V, BK, BV)

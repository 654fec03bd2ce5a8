"""The gradient of the log decays: everything that flows across token t.

    dg_t = sum_{i >= t} (read by i in all - given by i inside the chunk) + sum_{j < t} given by j to the chunk's state
           + what flows across the whole chunk (the gradients of its entries' totals, one for each storey)

The sums stay inside a chunk, where reads and gifts are the same numbers: over a long sequence their difference would
lose its digits.
"""

# C chunk, H heads
import triton
import triton.language as tl

from loglinear.kernels.triton.tiles import MIN_LOG_DECAY, SIZES, STOREY, locate


@triton.jit(do_not_specialize=SIZES)
def decay_backward_kernel(
    log_decay, walk_flow, row_flow, column_flow, state_flow, dtotals, dlog_decay, table,
    T, N, H,
    g_b, g_t, g_h, dg_t, storey_plane, part_plane,
    C: tl.constexpr, STOREYS: tl.constexpr, PARTS: tl.constexpr, PARTS_2: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One chunk, one head."""
    pid = tl.program_id(0)
    h, c = pid % H, (pid // H).to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n = tl.minimum(end - first, C).to(tl.int32)
    if n <= 0:
        return
    i = tl.arange(0, C)
    row = (c * H + h) * C + i
    read, column, state = tl.load(row_flow + row), tl.load(column_flow + row), tl.load(state_flow + row)
    read += tl.load(walk_flow + row)
    inside = i < n
    dg = tl.cumsum(tl.where(inside, read - column, 0.0), 0, reverse=True)
    state = tl.where(inside, state, 0.0)
    dg += tl.cumsum(state, 0) - state
    count = z + ((end - first + C - 1) // C).to(tl.int32)
    part = tl.arange(0, PARTS_2)
    across = tl.zeros([PARTS_2], tl.float32)
    for storey in tl.static_range(STOREYS):
        entry = (((z >> (STOREY * storey)) + 1) << (STOREY * storey)) - 1
        source = dtotals + storey * storey_plane + part * part_plane + (c - z + entry) * H + h
        across += tl.load(source, mask=part < tl.where(entry < count, PARTS, 0), other=0.0)
    dg += tl.sum(across, 0)
    g = tl.load(log_decay + b * g_b + first * g_t + h * g_h + i * g_t, mask=inside, other=0.0).to(tl.float32)
    dg = tl.where(g < MIN_LOG_DECAY, 0.0, dg)
    out = dlog_decay + (b * T + first) * dg_t + h + i * dg_t
    tl.store(out, dg.to(dlog_decay.dtype.element_ty), mask=inside)

"""The gradient of the log decays: the sum of all products that have the decay of token t in them.

    dg_t = sum_{i >= t} (reads of i in all - gifts of i inside the chunk) + sum_{j < t} gifts of j to the chunk's state
           + reads and gifts across the whole chunk (the gradients of its entries' totals, one for each tier)

The sums stay inside a chunk, where reads and gifts are the same numbers: over a long sequence their difference would
lose its digits.
"""

# C chunk, H heads
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import SIZES, Sizes, Slab
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.scalar_gate.states import Inputs, Inside, Reads, Totals
from loglinear.kernels.triton.tiles import MIN_LOG_DECAY, locate, rows_at, slab_at


@launcher
@triton.jit(do_not_specialize=SIZES)
def decay_backward_kernel(
    log_decay,
    inside,
    reads,
    dlog_state,
    dtotals,
    dlog_decay,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    C: tl.constexpr,
    TIERS: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_2: tl.constexpr,
    TREE: tl.constexpr,
):
    """One chunk, one head."""
    sizes = Sizes(T, N, H, R, L, cap)
    pid = tl.program_id(0)
    h = pid % H
    chunk = locate((pid // H).to(tl.int64), table, sizes, C)
    if chunk.n <= 0:
        return
    i = tl.arange(0, C)
    row = (chunk.c * H + h) * C + i
    read, column = tl.load(inside.dlog_row + row), tl.load(inside.dlog_column + row)
    state = tl.load(dlog_state + row)
    read += tl.load(reads.dlog_walk + row)
    is_token = i < chunk.n
    dg = tl.cumsum(tl.where(is_token, read - column, 0.0), 0, reverse=True)
    state = tl.where(is_token, state, 0.0)
    dg += tl.cumsum(state, 0) - state
    count = chunk.z + ((chunk.end - chunk.first + C - 1) // C).to(tl.int32)
    part = tl.arange(0, PARTS_2)
    across = tl.zeros([PARTS_2], tl.float32)
    for tier in tl.static_range(TIERS):
        entry = (((chunk.z >> (TREE.tier * tier)) + 1) << (TREE.tier * tier)) - 1
        source = dtotals.data + tier * dtotals.tier + part * dtotals.part + (chunk.c - chunk.z + entry) * H + h
        across += tl.load(source, mask=part < tl.where(entry < count, PARTS, 0), other=0.0)
    dg += tl.sum(across, 0)
    g = tl.load(rows_at(log_decay, chunk, h) + i * log_decay.t, mask=is_token, other=0.0).to(tl.float32)
    dg = tl.where(g < MIN_LOG_DECAY, 0.0, dg)
    out = slab_at(dlog_decay, chunk, sizes, h, 1) + i * dlog_decay.t
    tl.store(out, dg.to(dlog_decay.data.dtype.element_ty), mask=is_token)


def decay_backward(
    x: Inputs, inside: Inside, reads: Reads, dlog_state: Tensor, dtotals: Totals, dlog_decay: Slab
) -> None:
    """Write the gradient of the log decays."""
    tiers, parts = dtotals.data.shape[:2]
    decay_backward_kernel[(x.layout.chunks * x.heads,)](
        x.log_decay,
        inside,
        reads,
        dlog_state,
        dtotals,
        dlog_decay,
        x.layout.table,
        *x.sizes,
        C=x.chunk_size,
        TIERS=tiers,
        PARTS=parts,
        PARTS_2=1 << (parts - 1).bit_length(),
        TREE=x.tree,
        num_warps=1,
    )

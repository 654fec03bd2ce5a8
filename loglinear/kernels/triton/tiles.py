"""What the stages share on the device: where a chunk lies, which blocks its walk reads, tiles of rows, level masks.

Decays are kept as base-2 logarithms (``exp2`` is the hardware's exponential). All row strides are 32-bit within a
chunk; everything that reaches across chunks is 64-bit.
"""

# C chunk, K key, V value, L levels, z chunk number in its sequence, e exclusive end of a block in chunks
import triton
import triton.language as tl

from loglinear import kernels
from loglinear.kernels.triton import layout

# A storey is six levels of the tree: 64 entries are one tile of the sweeps. Above the cap a storey is one digit of a
# radix-64 Fenwick tree: its slots hold prefixes inside their run of 64, so a walk reads one slot for each storey.
STOREY = tl.constexpr(layout.STOREY)
RUN = tl.constexpr(1 << layout.STOREY)
READS = tl.constexpr(layout.READS)  # candidate reads of a walk: levels between chunks
MIN_LOG_DECAY = tl.constexpr(kernels.MIN_LOG_DECAY)
LOG2_E = tl.constexpr(1.4426950408889634)

# Sizes that vary from call to call: a kernel compiled for one serves them all.
SIZES = ["T", "N", "H", "R", "L", "cap", "storey", "is_top"]


@triton.jit
def head_program(count, H):
    """This program's number among `count`, its head, and the rest of its number; heads follow one another closely."""
    pid = tl.program_id(0)
    return pid % count, (pid // count) % H, pid // count // H


@triton.jit
def group_program(table, T, N, H, R, C: tl.constexpr, SPLIT: tl.constexpr, PACKED: tl.constexpr):
    """A program of one chunk and R / SPLIT heads of one group: the split's number, the group, its first head, how many;
    the chunk, and what `locate` says of it."""
    split, group, chunk = head_program(SPLIT, H // R)
    c, share = chunk.to(tl.int64), R // SPLIT
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    return split, group, group * R + split * share, share, c, b, first, end, z, z0, sequence


@triton.jit
def locate(c, table, T, N, C: tl.constexpr, PACKED: tl.constexpr):
    """Batch row, first token, end of the sequence, chunk number z, first chunk z0 and sequence of chunk c."""
    if PACKED:
        row = table + c * 5
        b = tl.full([], 0, tl.int64)
        z, first, end = tl.load(row), tl.load(row + 1).to(tl.int64), tl.load(row + 2).to(tl.int64)
        z0, sequence = tl.load(row + 3), tl.load(row + 4)
    else:
        b = (c // N).to(tl.int64)
        z = (c % N).to(tl.int32)
        first, end = z.to(tl.int64) * C, tl.full([], 0, tl.int64) + T
        z0, sequence = 0, (c // N).to(tl.int32)
    return b, first, end, z, z0, sequence


@triton.jit
def locate_run(run, table, N, storey, PACKED: tl.constexpr):
    """Row of the sequence's chunk 0, its number of chunks, the number of the run of 64 entries in it, z0, sequence."""
    if PACKED:
        row = table + run * 5
        origin, count, number = tl.load(row).to(tl.int64), tl.load(row + 1), tl.load(row + 2)
        z0, sequence = tl.load(row + 3), tl.load(row + 4)
    else:
        runs = tl.maximum(((N >> (STOREY * storey)) + RUN - 1) // RUN, 1)
        origin, count, number = (run // runs).to(tl.int64) * N, N, run % runs
        z0, sequence = 0, run // runs
    return origin, count, number, z0, sequence


@triton.jit
def load_rows(base, stride, n, first_column, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """A [ROWS, COLUMNS] tile of rows of WIDTH numbers; 0 from row n on and beyond WIDTH."""
    i, j = tl.arange(0, ROWS)[:, None], first_column + tl.arange(0, COLUMNS)[None, :]
    inside = i < n
    if WIDTH % COLUMNS != 0:
        inside = inside & (j < WIDTH)
    return tl.load(base + i * stride + j, mask=inside, other=0.0)


@triton.jit
def store_rows(base, stride, n, first_column, x, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    i, j = tl.arange(0, ROWS)[:, None], first_column + tl.arange(0, COLUMNS)[None, :]
    inside = i < n
    if WIDTH % COLUMNS != 0:
        inside = inside & (j < WIDTH)
    tl.store(base + i * stride + j, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_state(base, first_column, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """A [BK, BV] tile of a [K, V] state."""
    i, j = tl.arange(0, BK)[:, None], first_column + tl.arange(0, BV)[None, :]
    if (K == BK) & (V % BV == 0):
        return tl.load(base + i * V + j)
    else:
        return tl.load(base + i * V + j, mask=(i < K) & (j < V), other=0.0)


@triton.jit
def store_state(base, first_column, x, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    i, j = tl.arange(0, BK)[:, None], first_column + tl.arange(0, BV)[None, :]
    if (K == BK) & (V % BV == 0):
        tl.store(base + i * V + j, x.to(base.dtype.element_ty))
    else:
        tl.store(base + i * V + j, x.to(base.dtype.element_ty), mask=(i < K) & (j < V))


@triton.jit
def exponent(x):
    """floor(log2(x)) of integers 1 <= x < 2**24; negative for 0."""
    return (x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def dot_float32(x, y, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """x @ y for a float32 x that must not be rounded to y's bfloat16: it is multiplied as a high and a low half."""
    if tl.bfloat16 == DOT:
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(low, y, tl.dot(high, y))
    else:
        return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def walk(z, z0, cap):
    """The reads of chunk z as vectors over READS candidates: is it read, exclusive end of the block, is it a node.

    Below the cap candidate l is the block of 2**l chunks, read where bit l of z is set. The older past is one slot for
    each storey: candidate max(cap, 6 s) stands for the rest of storey s. Blocks that end at or before z0, where a
    continued sequence begins, are nodes: they come from the initial state, the oldest with the whole prefix in it.
    """
    l, oldest = tl.arange(0, READS), tl.minimum(cap, 31)
    digit = tl.where(l < cap, 1, (1 << ((l // STOREY + 1) * STOREY - l)) - 1) & (z >> l)
    is_first = (l <= cap) | (l % STOREY == 0)
    end = (z >> l) << l
    is_node = end <= z0
    read = is_first & (digit > 0) & ((end > z0) | (l < cap) | (end == (z0 >> oldest) << oldest))
    return read, end, is_node


@triton.jit
def reader_level(e, cap):
    """The candidate through which the readers of the slot of chunk e see it; they are the 2**l chunks behind it."""
    t = exponent((e + 1) & -(e + 1))
    return tl.where(t < cap, t, tl.maximum(cap, t // STOREY * STOREY))


@triton.jit
def paths(log_p, c, z, z0, cap, h, H):
    """For each candidate read: is it read, and its path, log2 of the decay from the block's end to chunk z."""
    read, end, is_node = walk(z, z0, cap)
    row = (c - z).to(tl.int64) + end - 1
    log_block = tl.load(log_p + row * H + h, mask=read & (end > z0), other=0.0)
    path = tl.cumsum(log_block, 0) - log_block
    return read, path


@triton.jit
def slot_pointer(slots, nodes, c, z, z0, sequence, l, cap, h, H, SIZE: tl.constexpr, NODES: tl.constexpr):
    """Where the state lies that candidate l of chunk z's walk reads."""
    end = (z >> l) << l
    pointer = slots + (((c - z).to(tl.int64) + end - 1) * H + h) * SIZE
    if NODES:
        m = tl.minimum(l, cap)
        node = nodes + ((sequence.to(tl.int64) * (cap + 1) + m) * H + h) * SIZE
        pointer = tl.where(end <= z0, node, pointer)
    return pointer


@triton.jit
def in_chunk_levels(rows, columns):
    """level(i, j) = bit_length(i XOR j) as a [rows, columns] tile."""
    return tl.maximum(exponent(rows[:, None] ^ columns[None, :]) + 1, 0)


@triton.jit
def load_in_chunk_scales(base, stride, n, L, scale, ROWS: tl.constexpr, LEVELS: tl.constexpr):
    """lambda at the levels inside a chunk, clamped to the last: [ROWS, LEVELS] float32, times scale."""
    i, l = tl.arange(0, ROWS)[:, None], tl.arange(0, LEVELS)[None, :]
    x = tl.load(base + i * stride + tl.minimum(l, L - 1), mask=i < n, other=0.0)
    return x.to(tl.float32) * scale


@triton.jit
def load_read_scales(base, stride, n, read, L, scale, ROWS: tl.constexpr, LOG_C: tl.constexpr):
    """lambda of each candidate read: [ROWS, READS] float32, times scale; 0 where nothing is read."""
    i, column = tl.arange(0, ROWS)[:, None], tl.minimum(LOG_C + 1 + tl.arange(0, READS), L - 1)[None, :]
    x = tl.load(base + i * stride + column, mask=(i < n) & read[None, :], other=0.0)
    return x.to(tl.float32) * scale


@triton.jit
def column_of(x, l):
    """Column l of a [ROWS, READS] tile."""
    return tl.sum(tl.where(tl.arange(0, READS)[None, :] == l, x, 0.0), 1)


# The places j < i at level l >= 1 of row i are one aligned block of 2**(l - 1) columns: the left sibling of the block
# that i lies in. A chunk has C - 1 left siblings of all sizes; number s in [2**m, 2**(m + 1)) is one of 2**m with
# C / 2**(m + 1) columns each, at level LOG_C - m. Number 0 is nobody. So a matrix that is constant on them is the
# product of a sparse [i, s] matrix with their indicator, and sums over them are a product with its transpose.


@triton.jit
def sibling_level(s, LOG_C: tl.constexpr):
    return LOG_C - tl.maximum(exponent(s), 0)


@triton.jit
def siblings(C: tl.constexpr, LOG_C: tl.constexpr):
    """[s, j]: does column j lie in left sibling s?"""
    s, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    level = sibling_level(s, LOG_C)
    return (s > 0) & ((j >> (level - 1)) == 2 * (s - (1 << (LOG_C - level))))


@triton.jit
def is_left_sibling(C: tl.constexpr, LOG_C: tl.constexpr):
    """[i, s]: is s one of the blocks that row i reads?"""
    i, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    level = sibling_level(s, LOG_C)
    return (s > 0) & ((i >> (level - 1)) == 2 * (s - (1 << (LOG_C - level))) + 1)


@triton.jit
def level_columns(C: tl.constexpr, LOG_C: tl.constexpr, LEVELS: tl.constexpr):
    """[l, s]: is left sibling s at level l?"""
    return tl.arange(0, LEVELS)[:, None] == sibling_level(tl.arange(0, C), LOG_C)[None, :]


@triton.jit
def spread_scales(
    scales, own, level_LC, sibling_CC,
    C: tl.constexpr, LOG_C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """LAM[i, j] = scales[i, level(i, j)] for i > j, own[i] on the diagonal, 0 above. ROUNDED: scales are bfloat16."""
    if ROUNDED:
        by_sibling = tl.dot(scales.to(DOT), level_LC, input_precision=PRECISION)
        by_sibling = tl.where(is_left_sibling(C, LOG_C), by_sibling, 0.0).to(DOT)
        spread = tl.dot(by_sibling, sibling_CC, input_precision=PRECISION)
    else:
        by_sibling = dot_float32(scales, level_LC, DOT, PRECISION)
        by_sibling = tl.where(is_left_sibling(C, LOG_C), by_sibling, 0.0)
        spread = dot_float32(by_sibling, sibling_CC, DOT, PRECISION)
    i = tl.arange(0, C)
    return tl.where(i[:, None] == i[None, :], own[:, None], spread)

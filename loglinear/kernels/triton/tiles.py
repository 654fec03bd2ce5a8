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
def group_program(
    table, T, N, H, R, C: tl.constexpr, HALVES: tl.constexpr, SPLIT: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """A program of one half of a chunk (HALVES 2, or all of it) and R / SPLIT heads of one group: the split's number, the
    group, its first head, how many; the half, how many tokens it has and which is its first; the chunk, and what
    `locate` says of it."""
    split, group, part = head_program(SPLIT, H // R)
    half, c, share = part % HALVES, (part // HALVES).to(tl.int64), R // SPLIT
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    first += half * (C // HALVES)
    n = tl.minimum(end - first, C // HALVES).to(tl.int32)
    return split, group, group * R + split * share, share, half, n, first, c, b, end, z, z0, sequence


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
def load_rows(base, stride, n, first_column, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, turn=0):
    """A [ROWS, COLUMNS] tile of rows of WIDTH numbers; 0 from row n on and beyond WIDTH. For `turn` see `rows_again`."""
    i, j = rows_again(turn, 0, ROWS)[:, None], first_column + tl.arange(0, COLUMNS)[None, :]
    inside = i < n
    if WIDTH % COLUMNS != 0:
        inside = inside & (j < WIDTH)
    return tl.load(base + (i * stride + j), mask=inside, other=0.0)


@triton.jit
def store_rows(base, stride, n, first_column, x, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, turn=0):
    i, j = rows_again(turn, 0, ROWS)[:, None], first_column + tl.arange(0, COLUMNS)[None, :]
    inside = i < n
    if WIDTH % COLUMNS != 0:
        inside = inside & (j < WIDTH)
    tl.store(base + (i * stride + j), x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_state(base, first_column, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, turn=0):
    """A [BK, BV] tile of a [K, V] state. For `turn` see `rows_again`."""
    i, j = rows_again(turn, 0, BK)[:, None], first_column + tl.arange(0, BV)[None, :]
    if (K == BK) & (V % BV == 0):
        return tl.load(base + (i * V + j))
    else:
        return tl.load(base + (i * V + j), mask=(i < K) & (j < V), other=0.0)


@triton.jit
def store_state(base, first_column, x, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    i, j = tl.arange(0, BK)[:, None], first_column + tl.arange(0, BV)[None, :]
    if (K == BK) & (V % BV == 0):
        tl.store(base + (i * V + j), x.to(base.dtype.element_ty))
    else:
        tl.store(base + (i * V + j), x.to(base.dtype.element_ty), mask=(i < K) & (j < V))


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
def load_blocks(log_p, c, z, z0, cap, h, H):
    """log2 of the decay of each block that chunk z reads, 0 for what it does not read and for nodes."""
    read, end, is_node = walk(z, z0, cap)
    row = (c - z).to(tl.int64) + end - 1
    return tl.load(log_p + row * H + h, mask=read & (end > z0), other=0.0)


@triton.jit
def paths(log_p, c, z, z0, cap, h, H):
    """For each candidate: is it read, and its path, log2 of the decay from the block's end to chunk z."""
    read, _, _ = walk(z, z0, cap)
    log_block = load_blocks(log_p, c, z, z0, cap, h, H)
    return read, tl.cumsum(log_block, 0) - log_block


@triton.jit
def path_of(l, log_block):
    """The path of one candidate: log2 of the decay over the nearer blocks."""
    return tl.sum(tl.where(tl.arange(0, READS) < l, log_block, 0.0), 0)


@triton.jit
def nearest(remaining):
    """The first candidate in a set of candidates given as bits; 0 when there is none."""
    return tl.maximum(exponent(remaining & -remaining), 0)


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
def load_ahead(pointers, mask):
    """A load whose value is carried to the next turn of a loop, for `arrived`. 16-bit numbers become 32-bit integers, which
    the load itself does: a conversion, or packing two of them into one register, would wait for it."""
    if pointers.dtype.element_ty.primitive_bitwidth == 16:
        return tl.load(pointers.to(tl.pointer_type(tl.int16), bitcast=True), mask=mask, other=0).to(tl.int32)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def arrived(x, dtype: tl.constexpr):
    """float32 of what `load_ahead` has loaded from an array of this dtype."""
    if dtype.primitive_bitwidth == 16:
        return x.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    else:
        return x.to(tl.float32)


@triton.jit
def load_scale(base, stride, n, column, L, i):
    """lambda of one level for each row, clamped to the last level: [rows], loaded ahead."""
    return load_ahead(base + (i * stride + tl.minimum(column, L - 1)), i < n)


# What does not change in a loop the compiler computes before it, and keeps in registers: it has none left for whole tiles
# and their masks. These change in no turn either, but it cannot know.


@triton.jit
def rows_again(turn, use: tl.constexpr, ROWS: tl.constexpr):
    """tl.arange(0, ROWS), anew for every turn of a loop and every use in it."""
    return tl.arange(0, ROWS) + (turn >> (30 - use))


@triton.jit
def zeros_again(turn, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros, anew for every turn: a product that is added to them stays in the loop."""
    return tl.zeros([ROWS, COLUMNS], tl.float32) + (turn >> 30) * 1.0


@triton.jit
def identity(SIZE: tl.constexpr, DOT: tl.constexpr):
    i = tl.arange(0, SIZE)
    return (i[:, None] == i[None, :]).to(tl.float32).to(DOT)


@triton.jit
def as_product(x, one, PRECISION: tl.constexpr):
    """float32 x, laid out over the threads as a product's result, which other products take as it is. A loaded tile is laid
    out for its load, and each product that it was scaled for would send it through shared memory."""
    return tl.dot(x, one, input_precision=PRECISION)


@triton.jit
def load_read_scales(base, stride, n, L, i, LOG_C: tl.constexpr):
    """lambda of each candidate read, whether it is read or not: [rows, READS], loaded ahead."""
    columns = tl.minimum(LOG_C + 1 + tl.arange(0, READS), L - 1)[None, :]
    return load_ahead(base + ((i * stride)[:, None] + columns), (i < n)[:, None] & (columns >= 0))


@triton.jit
def scales_as_product(scales, DTYPE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """float32 of a [rows, 16] tile of lambdas that were loaded ahead, see `as_product`."""
    x = arrived(scales, DTYPE)
    if DTYPE == DOT:
        return as_product(x.to(DOT), identity(16, DOT), PRECISION)
    else:
        return dot_float32(x, identity(16, DOT), DOT, PRECISION)


@triton.jit
def column_of(x, l):
    """Column l of a [rows, READS] tile."""
    return tl.sum(tl.where(tl.arange(0, READS)[None, :] == l, x, 0.0), 1)


# level(i, j) = bit_length(i XOR j) over a tile would take a comparison and a choice for each level and place. But levels
# up to 3, inside aligned blocks of 8, depend on j mod 8 alone, and farther ones on the block of 8 that j lies in. So a
# row needs 16 classes of columns: 8 near and 8 far ones. Products with their indicators spread a [row, class] tile to
# all columns, and fold sums over columns into one.


@triton.jit
def class_levels(i):
    """[i, c]: the level of class c for row i; -1 for the block of 8 that i itself lies in."""
    c = tl.arange(0, 16)[None, :]
    near = tl.maximum(exponent((i % 8)[:, None] ^ c) + 1, 0)
    far = tl.maximum(exponent((i // 8)[:, None] ^ (c - 8)) + 4, -1)
    return tl.where(c < 8, near, far)


@triton.jit
def near_classes(COLUMNS: tl.constexpr):
    """[j, c]: is j mod 8 = c?"""
    return (tl.arange(0, COLUMNS) % 8)[:, None] == tl.arange(0, 16)[None, :]


@triton.jit
def far_classes(COLUMNS: tl.constexpr):
    """[j, c]: is j in block c - 8?"""
    return (tl.arange(0, COLUMNS) // 8)[:, None] == (tl.arange(0, 16) - 8)[None, :]


@triton.jit
def is_near(i, COLUMNS: tl.constexpr):
    return (i[:, None] ^ tl.arange(0, COLUMNS)[None, :]) < 8


@triton.jit
def load_class_scales(base, stride, n, L, i):
    """lambda of each row's classes, 0 for its own block: [i, c], loaded ahead."""
    level = class_levels(i)
    columns = tl.minimum(tl.maximum(level, 0), L - 1)
    return load_ahead(base + ((i * stride)[:, None] + columns), (i < n)[:, None] & (level >= 0))


@triton.jit
def spread(x, classes, DOT: tl.constexpr, PRECISION: tl.constexpr):
    if x.dtype == DOT:
        return tl.dot(x, tl.trans(classes), input_precision=PRECISION)
    else:
        return dot_float32(x, tl.trans(classes), DOT, PRECISION)


@triton.jit
def spread_scales(
    scales, DTYPE: tl.constexpr, near_JC, far_JC, i, J: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """LAM[i, j] = lambda[i, level(i, j)] from scales [i, c] of an array of DTYPE; whoever takes it has to leave out j > i."""
    x = arrived(scales, DTYPE)
    if DTYPE == DOT:
        x = x.to(DOT)
    return tl.where(is_near(i, J), spread(x, near_JC, DOT, PRECISION), spread(x, far_JC, DOT, PRECISION))

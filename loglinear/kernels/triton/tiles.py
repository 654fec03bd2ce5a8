"""What the stages share on the device: where a chunk lies, tiles of rows and states, what the compiler must be told.

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
    """A program of one half of a chunk (all of it where HALVES is 1) and R / SPLIT heads of one group.

    The split's number, the group, its first head, how many; the half, how many tokens it has and which is its first;
    the chunk, and what `locate` says of it."""
    split, group, part = head_program(SPLIT, H // R)
    half, c, share = part % HALVES, (part // HALVES).to(tl.int64), R // SPLIT
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    first += half * (C // HALVES)
    n = tl.minimum(end - first, C // HALVES).to(tl.int32)
    return split.to(tl.int64), group, group * R + split * share, share, half, n, first, c, b, end, z, z0, sequence


@triton.jit
def scores_tile(dscores, plane, split, c, groups, group, queries, keys, HALVES: tl.constexpr, ROWS: tl.constexpr):
    """Where dA lies of the queries of one half and the keys of one not behind it: pairs 00, 10, 11."""
    PAIRS: tl.constexpr = HALVES * (HALVES + 1) // 2
    pair = (c * groups + group) * PAIRS + queries * (queries + 1) // 2 + keys
    return dscores + split * plane + pair * (ROWS * ROWS)


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
        z0, sequence = tl.full([], 0, tl.int32), (c // N).to(tl.int32)
    return b, first, end, z, z0, sequence


@triton.jit
def locate_run(run, table, N, storey, PACKED: tl.constexpr):
    """Row of the sequence's chunk 0, its number of chunks, the run's number in it, z0, sequence."""
    if PACKED:
        row = table + run * 5
        origin, count, number = tl.load(row).to(tl.int64), tl.load(row + 1), tl.load(row + 2)
        z0, sequence = tl.load(row + 3), tl.load(row + 4)
    else:
        runs = tl.maximum(((N >> (STOREY * storey)) + RUN - 1) // RUN, 1)
        origin, count, number = (run // runs).to(tl.int64) * N, N, run % runs
        z0, sequence = tl.full([], 0, tl.int32), run // runs
    return origin, count, number, z0, sequence


# What does not change in a loop the compiler computes before it and keeps in registers, of which there are none left
# for masks of whole tiles and their addresses: they end in local memory. The following does not change either, but the
# compiler cannot know: turns are below 2**28.


@triton.jit
def nothing(turn, use: tl.constexpr):
    """0, anew for every turn of a loop and every use in it."""
    return turn >> (30 - use)


@triton.jit
def rows_again(turn, use: tl.constexpr, ROWS: tl.constexpr):
    """tl.arange(0, ROWS), anew for every turn of a loop and every use in it."""
    return tl.arange(0, ROWS) + nothing(turn, use)


@triton.jit
def zeros_again(turn, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros, anew for every turn: a product that is added to them stays in the loop."""
    return tl.zeros([ROWS, COLUMNS], tl.float32) + nothing(turn, 0) * 1.0


@triton.jit
def load_rows(base, stride, n, first_column, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, turn=0):
    """A [ROWS, COLUMNS] tile of rows of WIDTH numbers; 0 from row n on and beyond WIDTH. `turn`: see `rows_again`."""
    i, j = rows_again(turn, 0, ROWS)[:, None], first_column + tl.arange(0, COLUMNS)[None, :]
    inside = i < n
    if WIDTH % COLUMNS != 0:
        inside = inside & (j < WIDTH)
    return tl.load(base + (i * stride + j), mask=inside, other=0.0)


@triton.jit
def store_rows(
    base, stride, n, first_column, x, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, turn=0
):
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
def load_block(
    base, i0, j0, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, turn=0
):
    """The [ROWS, COLUMNS] tile at (i0, j0) of a [HEIGHT, WIDTH] matrix, 0 outside of it. `turn`: see `rows_again`."""
    i, j = i0 + rows_again(turn, 0, ROWS)[:, None], j0 + tl.arange(0, COLUMNS)[None, :]
    if (HEIGHT % ROWS == 0) & (WIDTH % COLUMNS == 0):
        return tl.load(base + (i * WIDTH + j))
    else:
        return tl.load(base + (i * WIDTH + j), mask=(i < HEIGHT) & (j < WIDTH), other=0.0)


@triton.jit
def store_block(
    base, i0, j0, x, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, turn=0
):
    i, j = i0 + rows_again(turn, 0, ROWS)[:, None], j0 + tl.arange(0, COLUMNS)[None, :]
    if (HEIGHT % ROWS == 0) & (WIDTH % COLUMNS == 0):
        tl.store(base + (i * WIDTH + j), x.to(base.dtype.element_ty))
    else:
        tl.store(base + (i * WIDTH + j), x.to(base.dtype.element_ty), mask=(i < HEIGHT) & (j < WIDTH))


@triton.jit
def load_ahead(pointers, mask):
    """A load whose value is carried to the next turn of a loop, for `arrived`. 16-bit numbers become 32-bit integers,
    which the load itself does: a conversion, or packing two of them into one register, would wait for it."""
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
def identity(SIZE: tl.constexpr, DOT: tl.constexpr):
    i = tl.arange(0, SIZE)
    return (i[:, None] == i[None, :]).to(tl.float32).to(DOT)


@triton.jit
def as_product(x, one, PRECISION: tl.constexpr):
    """float32 x times the identity: laid out over the threads as a product's result, which other products take as it
    is. A loaded tile is laid out for its load, and would go through shared memory for each product of its multiples."""
    return tl.dot(x, one, input_precision=PRECISION)

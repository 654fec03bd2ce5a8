"""The place of a chunk, and tiles of rows and states: the parts that the stages share on the device.

Decays are kept as base-2 logarithms (``exp2`` is the hardware's exponential). All row strides are 32-bit within a
chunk; everything that reaches across chunks is 64-bit.
"""

# C chunk, K key, V value, L levels, z chunk number in its sequence, e exclusive end of a block in chunks
import triton
import triton.language as tl

from loglinear import kernels
from loglinear.kernels.triton.args import Chunk, Part, Run
from loglinear.kernels.triton.compiler import fresh_arange

MIN_LOG_DECAY = tl.constexpr(kernels.MIN_LOG_DECAY)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def head_program(count, H):
    """This program's number among `count`, its head, and the rest of its number; heads follow one another closely."""
    pid = tl.program_id(0)
    return pid % count, (pid // count) % H, pid // count // H


@triton.jit
def locate(c, table, sizes, C: tl.constexpr):
    """The chunk in row c of the per-chunk arrays. table: [chunks, 5] int32 of packed sequences, None of a batch."""
    if table is not None:
        row = table + c * 5
        b = tl.full([], 0, tl.int64)
        z, first, end = tl.load(row), tl.load(row + 1).to(tl.int64), tl.load(row + 2).to(tl.int64)
        z0, sequence = tl.load(row + 3), tl.load(row + 4)
    else:
        b = (c // sizes.N).to(tl.int64)
        z = (c % sizes.N).to(tl.int32)
        first, end = z.to(tl.int64) * C, tl.full([], 0, tl.int64) + sizes.T
        z0, sequence = tl.full([], 0, tl.int32), (c // sizes.N).to(tl.int32)
    return Chunk(c, z, z0, sequence, b, first, tl.minimum(end - first, C).to(tl.int32), end)


@triton.jit
def part_of(chunk, part, ROWS: tl.constexpr):
    """ROWS tokens of a chunk as a chunk: those from part * ROWS on, of which there may be none (n <= 0)."""
    first = chunk.first + part * ROWS
    n = tl.minimum(chunk.end - first, ROWS).to(tl.int32)
    return Chunk(chunk.c, chunk.z, chunk.z0, chunk.sequence, chunk.b, first, n, chunk.end)


@triton.jit
def part_of_program(table, sizes, C: tl.constexpr, HALVES: tl.constexpr, SPLIT: tl.constexpr):
    """This program's half of a chunk (all of it where HALVES is 1) and R / SPLIT heads of one group."""
    split, group, part = head_program(SPLIT, sizes.H // sizes.R)
    half, c, share = part % HALVES, (part // HALVES).to(tl.int64), sizes.R // SPLIT
    chunk = part_of(locate(c, table, sizes, C), half, C // HALVES)
    return Part(split.to(tl.int64), group, group * sizes.R + split * share, share, half, chunk)


@triton.jit
def locate_run(run, table, sizes, tier, TREE: tl.constexpr):
    """One run of 2**TREE.tier entries of a tier. table: [runs, 5] int32 of packed sequences, None for a dense batch."""
    RUN: tl.constexpr = 1 << TREE.tier
    if table is not None:
        row = table + run * 5
        origin, count, number = tl.load(row).to(tl.int64), tl.load(row + 1), tl.load(row + 2)
        z0, sequence = tl.load(row + 3), tl.load(row + 4)
    else:
        runs = tl.maximum(((sizes.N >> (TREE.tier * tier)) + RUN - 1) // RUN, 1)
        origin, count, number = (run // runs).to(tl.int64) * sizes.N, sizes.N, run % runs
        z0, sequence = tl.full([], 0, tl.int32), run // runs
    return Run(origin, count, number, z0, sequence)


@triton.jit
def rows_at(x, chunk, h):
    """The address of a chunk's rows of one head in `Rows`."""
    return x.data + chunk.b * x.b + chunk.first * x.t + h * x.h


@triton.jit
def slab_at(x, chunk, sizes, h, WIDTH):
    """The address of a chunk's rows of one head in a `Slab` of rows of WIDTH numbers."""
    return x.data + (chunk.b * sizes.T + chunk.first) * x.t + h * WIDTH


@triton.jit
def scores_at(dscores, part, groups, queries, keys, HALVES: tl.constexpr, ROWS: tl.constexpr):
    """The address of dA for the queries of one half and the keys of one not behind it: pairs 00, 10, 11."""
    PAIRS: tl.constexpr = HALVES * (HALVES + 1) // 2
    pair = (part.chunk.c * groups + part.group) * PAIRS + queries * (queries + 1) // 2 + keys
    return dscores.data + part.split * dscores.plane + pair * (ROWS * ROWS)


@triton.jit
def load_rows(base, stride, n, first_column, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, turn=0):
    """A [ROWS, COLUMNS] tile of rows of WIDTH numbers; 0 from row n on and beyond WIDTH. `turn`: see `fresh_arange`."""
    i, j = fresh_arange(turn, 0, ROWS)[:, None], first_column + tl.arange(0, COLUMNS)[None, :]
    inside = i < n
    if WIDTH % COLUMNS != 0:
        inside = inside & (j < WIDTH)
    return tl.load(base + (i * stride + j), mask=inside, other=0.0)


@triton.jit
def store_rows(
    base, stride, n, first_column, x, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, turn=0
):
    i, j = fresh_arange(turn, 0, ROWS)[:, None], first_column + tl.arange(0, COLUMNS)[None, :]
    inside = i < n
    if WIDTH % COLUMNS != 0:
        inside = inside & (j < WIDTH)
    tl.store(base + (i * stride + j), x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_state(base, first_column, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, turn=0):
    """A [BK, BV] tile of a [K, V] state. For `turn` see `fresh_arange`."""
    i, j = fresh_arange(turn, 0, BK)[:, None], first_column + tl.arange(0, BV)[None, :]
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
    """The [ROWS, COLUMNS] tile at (i0, j0) of a [HEIGHT, WIDTH] matrix, 0 outside of it. `turn`: see `fresh_arange`."""
    i, j = i0 + fresh_arange(turn, 0, ROWS)[:, None], j0 + tl.arange(0, COLUMNS)[None, :]
    if (HEIGHT % ROWS == 0) & (WIDTH % COLUMNS == 0):
        return tl.load(base + (i * WIDTH + j))
    else:
        return tl.load(base + (i * WIDTH + j), mask=(i < HEIGHT) & (j < WIDTH), other=0.0)


@triton.jit
def store_block(
    base, i0, j0, x, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, turn=0
):
    i, j = i0 + fresh_arange(turn, 0, ROWS)[:, None], j0 + tl.arange(0, COLUMNS)[None, :]
    if (HEIGHT % ROWS == 0) & (WIDTH % COLUMNS == 0):
        tl.store(base + (i * WIDTH + j), x.to(base.dtype.element_ty))
    else:
        tl.store(base + (i * WIDTH + j), x.to(base.dtype.element_ty), mask=(i < HEIGHT) & (j < WIDTH))


@triton.jit
def exponent(x):
    """floor(log2(x)) of integers 1 <= x < 2**24; negative for 0."""
    return (x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def dot_float32(x, y, MATH: tl.constexpr):
    """x @ y for a float32 x that must not be rounded to y's bfloat16: it is multiplied as a high and a low half."""
    if MATH.dot == tl.bfloat16:
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(low, y, tl.dot(high, y))
    else:
        return tl.dot(x, y, input_precision=MATH.precision)

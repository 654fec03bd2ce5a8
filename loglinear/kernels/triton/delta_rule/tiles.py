"""The parts that the delta rule's stages share on the device: a chunk's own matrices, and the places of entries.

A transition is P = exp(Gam) I + D, of which D [K, K] is kept, and log2 of exp(Gam) in float32: where keys come again
P is close to I, and D is rounded to 16 bits as what it is, small. With a diagonal gate it is Diag(exp(Gam)) + D.
Matrices wider than TK are taken in tiles of TK columns.
"""

# C chunk, J tokens of a part, K key, V value, i number of an entry in its run
from typing import NamedTuple

import triton
import triton.language as tl

from loglinear.kernels.triton.args import Chunk
from loglinear.kernels.triton.levels import far_classes, load_class_scales, near_classes, spread_scales
from loglinear.kernels.triton.tiles import head_program, load_block, load_rows, locate, rows_at


class HeadRows(NamedTuple):
    """The rows of one head from one of them on, and the stride of a row."""

    data: tl.tensor
    t: tl.tensor


class HeadPart(NamedTuple):
    """The share of one program: one head, and C / PARTS rows of a chunk, of which there may be none (own.n is 0)."""

    h: tl.tensor
    part: tl.tensor
    first: tl.tensor  # the part's first row
    whole: Chunk
    own: Chunk


class EntryRun(NamedTuple):
    """A run of entries: its row, the row of its entry 0, its entries start .. stop - 1, its number in its sequence, the
    sequence; and is there a later run, for which this one has to be whole?"""

    row: tl.tensor
    base: tl.tensor
    start: tl.tensor
    stop: tl.tensor
    number: tl.tensor
    sequence: tl.tensor
    has_end: tl.tensor


class EntryPlace(NamedTuple):
    """The place of an entry: its row, its number in its run, the number of the first one there; the run's row, and its
    number in its sequence."""

    row: tl.tensor
    i: tl.tensor
    start: tl.tensor
    run: tl.tensor
    number: tl.tensor


@triton.jit
def head_rows(x, chunk, h):
    """A chunk's rows of one head in `Rows`."""
    return HeadRows(rows_at(x, chunk, h), x.t)


@triton.jit
def rows_from(x, first):
    return HeadRows(x.data + first * x.t, x.t)


@triton.jit
def part_of_head(table, sizes, C: tl.constexpr, PARTS: tl.constexpr):
    """This program's head and rows of a chunk."""
    _, h, number = head_program(1, sizes.H)
    part, J = number % PARTS, C // PARTS
    x = locate((number // PARTS).to(tl.int64), table, sizes, C)
    n = tl.maximum(tl.minimum(x.n - part * J, J), 0)
    own = Chunk(x.c, x.z, x.z0, x.sequence, x.b, x.first + part * J, n, x.end)
    return HeadPart(h, part, part * J, x, own)


@triton.jit
def inverse_at(saved, chunk, h, C: tl.constexpr):
    """Pointer to a chunk's A of one head in `Saved`."""
    return saved.inverse + chunk.c * saved.stride + h * (C * C)


@triton.jit
def row_products(
    x, y, x_n, y_n, WIDTH: tl.constexpr, I: tl.constexpr, J: tl.constexpr, COLUMNS: tl.constexpr, MATH: tl.constexpr
):
    """X Y^T of I and J rows."""
    products_IJ = tl.zeros([I, J], tl.float32)
    for column in tl.static_range(0, WIDTH, COLUMNS):
        x_IT = load_rows(x.data, x.t, x_n, column, I, WIDTH, COLUMNS).to(MATH.dot)
        y_JT = load_rows(y.data, y.t, y_n, column, J, WIDTH, COLUMNS).to(MATH.dot)
        products_IJ = tl.dot(x_IT, tl.trans(y_JT), products_IJ, input_precision=MATH.precision)
    return products_IJ


@triton.jit
def multiply_rows(x, y, x_n, y_n, WIDTH: tl.constexpr, J: tl.constexpr, COLUMNS: tl.constexpr, MATH: tl.constexpr):
    """X Y^T of J rows each. A loop that is not unrolled: no tile is kept in registers for another product."""
    products_JJ = tl.zeros([J, J], tl.float32)
    for column in range(0, WIDTH, COLUMNS):
        x_JT = load_rows(x.data, x.t, x_n, column, J, WIDTH, COLUMNS).to(MATH.dot)
        y_JT = load_rows(y.data, y.t, y_n, column, J, WIDTH, COLUMNS).to(MATH.dot)
        products_JJ = tl.dot(x_JT, tl.trans(y_JT), products_JJ, input_precision=MATH.precision)
    return products_JJ


@triton.jit
def chunk_scales(
    scales,
    n,
    L,
    i,
    DTYPE: tl.constexpr,
    C: tl.constexpr,
    LINEAR: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """LAM of the rows i of one chunk and head, its lower triangle; scales: of the chunk's first token, which has n."""
    lambdas = load_class_scales(scales.data, scales.t, n, L, 0, i, LINEAR, TREE)
    near_JC, far_JC = near_classes(C).to(tl.float32).to(MATH.dot), far_classes(C).to(tl.float32).to(MATH.dot)
    scales_IC = spread_scales(lambdas, scales.t, n, L, near_JC, far_JC, i, DTYPE, C, LINEAR, TREE, MATH)
    return tl.where(i[:, None] >= tl.arange(0, C)[None, :], scales_IC, 0.0)


@triton.jit
def decay(G_rows, G, i, C: tl.constexpr):
    """dec[i, j] = exp(G_i - G_j) for i >= j, else 0; G in base 2."""
    return tl.where(i[:, None] >= tl.arange(0, C)[None, :], tl.exp2(G_rows[:, None] - G[None, :]), 0.0)


@triton.jit
def load_strength(beta, n, C: tl.constexpr):
    """beta of C tokens, of which there are n, and 0 behind them."""
    i = tl.arange(0, C)
    return tl.load(beta.data + i * beta.t, mask=i < n, other=0.0).to(tl.float32)


@triton.jit
def load_decays(cumulative, C: tl.constexpr):
    """G, and its last value Gam."""
    i = tl.arange(0, C)
    G = tl.load(cumulative + i)
    return G, tl.sum(tl.where(i == C - 1, G, 0.0), 0)


@triton.jit
def row_decays(totals, entry, first, K: tl.constexpr, ROWS: tl.constexpr):
    """log2 of an entry's decay, as a factor of the rows of a state from `first` on: in `Totals` one number, or a column
    of them."""
    if totals.channels is not None:
        i = first + tl.arange(0, ROWS)
        return tl.load(totals.channels + entry * K + i, mask=i < K, other=0.0)[:, None]
    else:
        return tl.load(totals.heads + entry)


@triton.jit
def column_decays(totals, entry, first, K: tl.constexpr, COLUMNS: tl.constexpr, is_there=True):
    """The same as a factor of columns; 0 of an entry that is not there."""
    if totals.channels is not None:
        j = first + tl.arange(0, COLUMNS)
        return tl.load(totals.channels + entry * K + j, mask=(j < K) & is_there, other=0.0)[None, :]
    else:
        return tl.load(totals.heads + entry, mask=is_there, other=0.0)


@triton.jit
def load_tokens(x, first, J: tl.constexpr):
    """J numbers of a chunk, from a part's first token on."""
    return tl.load(x + first + tl.arange(0, J))


@triton.jit
def load_tile(matrix, i, j, C: tl.constexpr, J: tl.constexpr, turn=0):
    """The [J, J] tile at (i, j) of a [C, C] matrix. `turn`: see `fresh_arange`."""
    return load_block(matrix, i, j, C, C, J, J, turn)


@triton.jit
def locate_entries(run, table, per_row, TREE: tl.constexpr):
    """One run of a tier. table: [runs, 6] int32 of packed sequences, None for a dense batch."""
    RUN: tl.constexpr = 1 << TREE.tier
    if table is not None:
        row = table + run * 6
        base, start, stop = tl.load(row).to(tl.int64), tl.load(row + 1), tl.load(row + 2)
        number, sequence, has_end = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5) > 0
    else:
        runs = (per_row + RUN - 1) // RUN
        sequence, number = run // runs, run % runs
        base, start = sequence.to(tl.int64) * per_row + number * RUN, tl.zeros([], tl.int32)
        stop, has_end = tl.minimum(per_row - number * RUN, RUN), number < runs - 1
    return EntryRun(run, base, start, stop, number, sequence, has_end)


@triton.jit
def place_in_run(chunk, first_runs, N, TREE: tl.constexpr):
    """The place of a chunk (or `Place`) as an entry of tier 0. first_runs: [N] int64 of packed sequences, or None."""
    BITS: tl.constexpr = TREE.tier
    RUN: tl.constexpr = 1 << BITS
    z, z0 = chunk.z, chunk.z0
    start = tl.where(z0 >> BITS == z >> BITS, z0 & (RUN - 1), 0)
    if first_runs is not None:
        run = tl.load(first_runs + chunk.sequence) + (z >> BITS) - (z0 >> BITS)
    else:
        run = chunk.sequence.to(tl.int64) * ((N + RUN - 1) // RUN) + (z >> BITS)
    return EntryPlace(chunk.c, z & (RUN - 1), start, run, z >> BITS)

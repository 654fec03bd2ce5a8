"""What the delta rule's stages share on the device: a chunk's own matrices, entries and what they read.

A transition is P = exp(Gam) I + D, of which D [K, K] is kept, and log2 of exp(Gam) in float32: where keys come again
P is close to I, and D is rounded to 16 bits as what it is, small. Matrices wider than TK are taken in tiles of TK
columns.
"""

# C chunk, K key, V value, i number of an entry in its run
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule import layout
from loglinear.kernels.triton.levels import far_classes, load_class_scales, near_classes, spread_scales
from loglinear.kernels.triton.tiles import exponent, head_program, load_rows
from loglinear.kernels.triton.walks import READS

BITS = tl.constexpr(layout.STOREY)
RUN = tl.constexpr(layout.RUN)
SIZES = ["T", "N", "H", "R", "L", "cap", "per_row", "num_slots", "columns", "collapsed", "first_level", "places"]


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
def part_program(table, T, N, H, C: tl.constexpr, PARTS: tl.constexpr, PACKED: tl.constexpr):
    """A program of C / PARTS rows of a chunk and one head: the head and the chunk, what `locate` says of it (without
    the end), how many tokens the chunk has, the part's first row, and how many tokens the part has: 0 perhaps, of a
    chunk that has some."""
    _, h, number = head_program(1, H)
    part, c = number % PARTS, (number // PARTS).to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n_keys, skipped = tl.minimum(end - first, C).to(tl.int32), part * (C // PARTS)
    n = tl.maximum(tl.minimum(n_keys - skipped, C // PARTS), 0)
    return h, c, b, first, z, z0, sequence, n_keys, skipped, n


@triton.jit
def key_products(
    k_rows, k_t, n, others, others_n,
    K: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """K K'^T of C tokens each."""
    keys_CC = tl.zeros([C, C], tl.float32)
    for kt in tl.static_range(0, K, TK):
        k_CT = load_rows(k_rows, k_t, n, kt, C, K, TK).to(MATH.dot)
        others_CT = load_rows(others, k_t, others_n, kt, C, K, TK).to(MATH.dot)
        keys_CC = tl.dot(k_CT, tl.trans(others_CT), keys_CC, input_precision=MATH.precision)
    return keys_CC


@triton.jit
def query_products(
    q_rows, k_rows, q_t, k_t, n, n_keys,
    K: tl.constexpr, I: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Q K^T of I rows of queries and a chunk's keys."""
    scores_IC = tl.zeros([I, C], tl.float32)
    for kt in tl.static_range(0, K, TK):
        q_IT = load_rows(q_rows, q_t, n, kt, I, K, TK).to(MATH.dot)
        k_CT = load_rows(k_rows, k_t, n_keys, kt, C, K, TK).to(MATH.dot)
        scores_IC = tl.dot(q_IT, tl.trans(k_CT), scores_IC, input_precision=MATH.precision)
    return scores_IC


@triton.jit
def chunk_scales(
    scales, l_t, n, L, i,
    DTYPE: tl.constexpr, C: tl.constexpr, LINEAR: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """LAM of the rows i of one chunk and head, its lower triangle; scales: of the chunk's first token, which has n."""
    lambdas = load_class_scales(scales, l_t, n, L, 0, i, LINEAR)
    near_JC, far_JC = near_classes(C).to(tl.float32).to(MATH.dot), far_classes(C).to(tl.float32).to(MATH.dot)
    scales_IC = spread_scales(lambdas, near_JC, far_JC, i, DTYPE, C, LINEAR, MATH)
    return tl.where(i[:, None] >= tl.arange(0, C)[None, :], scales_IC, 0.0)


@triton.jit
def decay(G_rows, G, i, C: tl.constexpr):
    """dec[i, j] = exp(G_i - G_j) for i >= j, else 0; G in base 2."""
    return tl.where(i[:, None] >= tl.arange(0, C)[None, :], tl.exp2(G_rows[:, None] - G[None, :]), 0.0)


@triton.jit
def load_strength(beta, beta_t, n, C: tl.constexpr):
    """beta of a chunk's tokens, 0 behind them."""
    i = tl.arange(0, C)
    return tl.load(beta + i * beta_t, mask=i < n, other=0.0).to(tl.float32)


@triton.jit
def load_decays(cumulative, C: tl.constexpr):
    """G, and its last value Gam."""
    i = tl.arange(0, C)
    G = tl.load(cumulative + i)
    return G, tl.sum(tl.where(i == C - 1, G, 0.0), 0)


@triton.jit
def locate_entries(run, table, per_row, PACKED: tl.constexpr):
    """The row of a run's entry 0, its entries start .. stop - 1, its number in its sequence, the sequence; and is there
    a later run, for which this one has to be whole?"""
    if PACKED:
        row = table + run * 6
        base, start, stop = tl.load(row).to(tl.int64), tl.load(row + 1), tl.load(row + 2)
        number, sequence, has_end = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5) > 0
    else:
        runs = (per_row + RUN - 1) // RUN
        sequence, number = run // runs, run % runs
        base, start = sequence.to(tl.int64) * per_row + number * RUN, tl.zeros([], tl.int32)
        stop, has_end = tl.minimum(per_row - number * RUN, RUN), number < runs - 1
    return base, start, stop, number, sequence, has_end


@triton.jit
def locate_in_run(z, z0, sequence, first_runs, N, PACKED: tl.constexpr):
    """Chunk z's number in its run, the first one's there, and the run's row."""
    start = tl.where(z0 >> BITS == z >> BITS, z0 & (RUN - 1), 0)
    if PACKED:
        run = tl.load(first_runs + sequence) + (z >> BITS) - (z0 >> BITS)
    else:
        run = sequence.to(tl.int64) * ((N + RUN - 1) // RUN) + (z >> BITS)
    return z & (RUN - 1), start, run


@triton.jit
def slots_read(i, num_slots):
    """The slots that entry i of a run reads, as bits: one for each bit of i, the last for all bits from it on."""
    last = num_slots - 1
    return (i & ((1 << last) - 1)) | ((i >> last) > 0).to(tl.int32) << last


@triton.jit
def slot_of_next(i, num_slots):
    """The slot of entry i + 1 that entry i is in, with all that entry i has in slots up to it."""
    after = i + tl.full([], 1, tl.int32)
    return tl.minimum(exponent(after & -after), num_slots - 1)


@triton.jit
def columns_read(number, columns, NODES: tl.constexpr):
    """The carried states that a run reads, as bits. A state's prefix may be in the last one."""
    last = columns - 1
    bits = (number & ((1 << last) - 1)) | (((number >> last) > 0) | NODES).to(tl.int32) << last
    return tl.where(columns > 0, bits, 0)


@triton.jit
def count_bits(x):
    """Of x < 2**16."""
    return tl.sum((x >> tl.arange(0, READS)) & 1, 0)

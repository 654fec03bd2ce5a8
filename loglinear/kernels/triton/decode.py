"""The parts that the one-token steps of both families share on the device.

A program is one row of the batch, one head, and a tile of V. Everything that it changes of the states is its own; what
heads or tiles share, the buffers, gets the new token from one of them, and all others take it from the inputs.
"""

# N rows, C chunk, M blocks, G groups, H heads, K key, V value, L levels, m a block's number
import triton
import triton.language as tl

from loglinear.kernels.triton.levels import digit_column
from loglinear.kernels.triton.tiles import LOG2_E, MIN_LOG_DECAY, exponent

# For compute capability 9.0 and later, ptxas 12.8 compiles `min(x, c) == c` of 16-bit numbers as `x <= c`. Numbers get
# 16 bits where the compiler knows that they are small. So blocks' numbers are compared with <, <=, > and >= where a
# minimum is one of them, and tests/kernels/test_compiled_steps.py reads what ptxas makes of that.
ONE_DONE = tl.constexpr(1 << 40)  # above the bits of a position the programs count that are done with their row
SIZES = ["H", "R", "L"]


@triton.jit
def own_program(H, TILES: tl.constexpr):
    """Row, head and tile of this program."""
    pid = tl.program_id(0)
    return (pid // TILES // H).to(tl.int64), pid // TILES % H, pid % TILES


@triton.jit
def is_idle(active, n):
    """Does this row get no token?"""
    if active is not None:
        return tl.load(active + n) == 0
    else:
        return tl.zeros([], tl.int32) > 0


@triton.jit
def begin(position, n):
    """The number of tokens before this one."""
    return tl.load(position + n) % ONE_DONE


@triton.jit
def is_last(position, n, programs):
    """Is this the last of a row's programs? Each asks once, when it has read the position."""
    return tl.atomic_add(position + n, tl.full([], 0, tl.int64) + ONE_DONE) // ONE_DONE == programs - 1


@triton.jit
def end(position, n, t, programs):
    """The last of a row's programs moves its position: none reads it afterwards."""
    if is_last(position, n, programs):
        tl.store(position + n, t + 1)


@triton.jit
def token_at(x, n, h):
    """The address of one head of a row's token in `Tokens`."""
    return x.data + n * x.n + h * x.h


@triton.jit
def load_token(x, row, mask):
    """A row of a new token in float32."""
    return tl.load(x + row, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def decays(buffer, H, new, place, C: tl.constexpr):
    """log2 of the decay from each of the chunk's tokens to the new one, and from the chunk's start to it. buffer: the
    head's log decays [C, H], of which those before `place` count."""
    i = tl.arange(0, C)
    behind = tl.load(buffer + (i + 1) * H, mask=i + 1 < place, other=0.0)
    behind = tl.where(i + 1 == place, new, behind)
    first = tl.load(buffer, mask=place > 0, other=0.0)
    return tl.cumsum(behind, 0, reverse=True) * LOG2_E, (tl.sum(behind, 0) + tl.where(place > 0, first, new)) * LOG2_E


@triton.jit
def load_decay(log_decay):
    return tl.maximum(tl.load(log_decay).to(tl.float32), MIN_LOG_DECAY)


@triton.jit
def place_scales(scales, place, L, C: tl.constexpr, TREE: tl.constexpr):
    """lambda of the chunk's tokens as the new one sees them, 0 behind it."""
    i = tl.arange(0, C)
    column = tl.maximum(digit_column(place >> TREE.finest_log, i >> TREE.finest_log, TREE), 0)
    return tl.load(scales + tl.minimum(column, L - 1), mask=i <= place, other=0.0).to(tl.float32)


@triton.jit
def digit_of(m, TREE: tl.constexpr):
    """p of block m, which has radix**p chunks."""
    digit = m // TREE.others
    if TREE.last < TREE.blocks:
        digit = tl.minimum(digit, TREE.last)
    return digit


@triton.jit
def is_block(z, m, TREE: tl.constexpr):
    """Is block m there after z chunks? `Partition.has_block` of the kernels."""
    digit = digit_of(m, TREE)
    count, nearer = z >> digit * TREE.radix_log, m - digit * TREE.others
    is_open = m == TREE.blocks - 1  # its count goes beyond the digit, as that of the largest blocks does
    if TREE.last < TREE.blocks:
        is_open |= m >= TREE.last * TREE.others
    return (count > nearer) & (((count & TREE.others) > nearer) | is_open)


@triton.jit
def read_blocks(
    read_TV,
    x_T,
    scales,
    z,
    L,
    blocks,
    step,
    first_row,
    first_column,
    K: tl.constexpr,
    V: tl.constexpr,
    TREE: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    UNROLL: tl.constexpr,
    SPARSE: tl.constexpr,
):
    """read + sum_m lambda_m diag(x) S_m, over the blocks that are there, of rows of K: their sum is the output. No sum
    over threads in the loop, so that the loads of UNROLL blocks are under way together. SPARSE: a block whose lambda is
    0 is not read, so each load waits for its lambda."""
    for first in range(0, TREE.blocks, UNROLL):
        for u in tl.static_range(UNROLL):
            m = first + u
            there = (m < TREE.blocks) & is_block(z, m, TREE)
            scale = tl.load(scales + tl.minimum(m + TREE.column, L - 1), mask=there, other=0.0).to(tl.float32)
            if SPARSE:
                there = there & (scale != 0)
            state_TV = load_part(blocks + m * step, first_row, first_column, there, K, V, TK, BV)
            read_TV += (scale * x_T)[:, None] * state_TV
    return read_TV


@triton.jit
def merged_into(z, TREE: tl.constexpr):
    """The block that takes the smaller ones and the chunk that is now full, the z-th."""
    z = z + 1
    x = z | (1 << TREE.largest_log)
    digit = exponent(x & -x) // TREE.radix_log
    return tl.minimum(digit * TREE.others, TREE.blocks - 1)


@triton.jit
def is_pushed(m, target, TREE: tl.constexpr):
    """Does block m get one number more when `target` becomes the nearest of its size? The last one takes all in."""
    larger = target + TREE.others
    if TREE.last < TREE.blocks:
        larger = tl.where(target < TREE.last * TREE.others, larger, TREE.blocks)
    return (m >= target) & (m < larger) & (m < TREE.blocks - 1)


@triton.jit
def load_buffer(rows, stride, place, new_T, first_column, WIDTH: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr):
    """A [C, COLUMNS] tile of the chunk's rows of WIDTH numbers with the new token's among them, 0 behind it."""
    i, j = tl.arange(0, C)[:, None], first_column + tl.arange(0, COLUMNS)[None, :]
    old_IJ = tl.load(rows + (i * stride + j), mask=(i < place) & (j < WIDTH), other=0.0)
    return tl.where(i == place, new_T[None, :], old_IJ)


@triton.jit
def load_part(
    block, first_row, first_column, there, K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr
):
    """A [TK, BV] tile of a block's state [K, V], 0 where it is not there."""
    i, j = first_row + tl.arange(0, TK)[:, None], first_column + tl.arange(0, BV)[None, :]
    return tl.load(block + (i * V + j), mask=(i < K) & (j < V) & there, other=0.0)


@triton.jit
def store_part(
    block, first_row, first_column, x, there, K: tl.constexpr, V: tl.constexpr, TK: tl.constexpr, BV: tl.constexpr
):
    i, j = first_row + tl.arange(0, TK)[:, None], first_column + tl.arange(0, BV)[None, :]
    tl.store(block + (i * V + j), x, mask=(i < K) & (j < V) & there)


@triton.jit
def join_blocks(
    joined_TV,
    decay,
    z,
    target,
    blocks,
    step,
    first_row,
    first_column,
    K: tl.constexpr,
    V: tl.constexpr,
    TREE: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
):
    """A tile of all blocks after a full chunk, the z-th, whose own state is `joined`. The others decay to its end,
    exp2(decay); the smaller ones join it in block `target`, which pushes those of its size one number up."""
    pushed_TV = tl.zeros([TK, BV], tl.float32)
    for m in range(TREE.blocks):
        there, block = is_block(z, m, TREE), blocks + m * step
        state_TV = load_part(block, first_row, first_column, there, K, V, TK, BV) * tl.exp2(decay)
        if TREE.is_queue:
            leaves, arrived_TV = is_pushed(m, target, TREE), pushed_TV
            pushed_TV = tl.where(leaves, state_TV, 0.0)
            state_TV = tl.where(leaves, 0.0, state_TV) + arrived_TV
            there |= is_block(z + 1, m, TREE)
        is_older = m > target  # the others are all there
        joined_TV += tl.where(is_older, 0.0, state_TV)
        state_TV = tl.where(is_older, state_TV, tl.where(m < target, 0.0, joined_TV))
        store_part(block, first_row, first_column, state_TV, there | (m <= target), K, V, TK, BV)

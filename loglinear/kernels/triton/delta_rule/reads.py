"""The reads of an entry as sets: slots of its run, and columns that are carried to the run.

With radix 2 a set is given by its bits. With a larger radix r they are too many. There a set is a number whose digit p
says how many of the columns p (r - 1), p (r - 1) + 1, ... are in it, plus 2**24 for each of them; a set of slots is one
digit. It is read from the farthest of a digit to the nearest. `after` takes the first one out.
"""

# i number of an entry in its run, j slot
from typing import NamedTuple

import triton
import triton.language as tl

from loglinear.kernels.triton.tiles import exponent
from loglinear.kernels.triton.tree import LEVELS
from loglinear.kernels.triton.walks import height_of, nearest

MOST_BITS = tl.constexpr(LEVELS)
COUNT = tl.constexpr(24)  # from this bit on a set has its size
DIGITS = tl.constexpr((1 << 24) - 1)


class Step(NamedTuple):
    """The slots of an entry, brought to the next one: `merged` come with the entry itself into slot `target`, and
    `moved` into slots of their own."""

    target: tl.tensor
    merged: tl.tensor
    moved: tl.tensor


@triton.jit
def count_bits(x):
    """The number of bits of x < 2**16 that are set."""
    return tl.sum((x >> tl.arange(0, MOST_BITS)) & 1, 0)


@triton.jit
def count_reads(reads, TREE: tl.constexpr):
    """The size of a set from which nothing was taken."""
    if TREE.radix_log == 1:
        return count_bits(reads)
    else:
        return reads >> COUNT


@triton.jit
def first_slot(reads, TREE: tl.constexpr):
    """The first of a set that is not empty."""
    if TREE.radix_log == 1:
        return nearest(reads)
    else:
        digits = reads & DIGITS
        p = tl.maximum(exponent(digits & -digits), 0) // TREE.radix_log
        return p * TREE.others + ((digits >> p * TREE.radix_log) & TREE.others) - 1


@triton.jit
def first_column(reads, columns, TREE: tl.constexpr):
    """The same of a set of columns, of which there are `columns`."""
    if TREE.radix_log == 1:
        return nearest(reads)
    else:
        return tl.minimum(first_slot(reads, TREE), columns - 1)


@triton.jit
def slots_read(i, num_slots, TREE: tl.constexpr):
    """The slots that entry i of a run reads: one for each bit of i, with a larger radix one for each entry before it.
    The last slot is for all from it on."""
    if TREE.radix_log == 1:
        last = num_slots - 1
        return (i & ((1 << last) - 1)) | ((i >> last) > 0).to(tl.int32) << last
    else:
        count = tl.minimum(i, num_slots)
        return count + (count << COUNT)


@triton.jit
def is_slot_read(i, j, num_slots, TREE: tl.constexpr):
    """Does entry i of a run read slot j, of which there may be none?"""
    if TREE.radix_log == 1:
        return (slots_read(i, num_slots, TREE) >> tl.minimum(j, 31)) & 1
    else:
        return (j < tl.minimum(i, num_slots)).to(tl.int32)


@triton.jit
def slot_of_next(i, num_slots):
    """With radix 2 the slot of entry i + 1 that entry i is in, with all that entry i has in slots up to it."""
    after = i + tl.full([], 1, tl.int32)
    return tl.minimum(exponent(after & -after), num_slots - 1)


@triton.jit
def step_of(i, num_slots, TREE: tl.constexpr):
    """The `Step` from entry i to the next one, which behind the run is the next tier's: one block."""
    if TREE.radix_log == 1:
        t, reads = slot_of_next(i, num_slots), slots_read(i, num_slots, TREE)
        merged = reads & ((2 << t) - 1)
        return Step(t, merged, reads - merged)
    else:
        reads = slots_read(i, num_slots, TREE)
        is_merged = (i == TREE.others) | (num_slots == 1)
        merged = tl.where(is_merged, reads, 0)
        return Step(tl.zeros([], tl.int32), merged, reads - merged)


@triton.jit
def count_moves(moved, num_slots, TREE: tl.constexpr):
    """The slots of the next entry that the `moved` come into. The last two come into one."""
    if TREE.radix_log == 1:
        return count_bits(moved)
    else:
        return tl.minimum(moved >> COUNT, num_slots - 1)


@triton.jit
def first_move(moved, num_slots, TREE: tl.constexpr):
    """The first of the `moved` that come into one slot, this slot, and those that are left."""
    if TREE.radix_log == 1:
        j = nearest(moved)
        return moved & -moved, j, moved & (moved - 1)
    else:
        farthest = moved & DIGITS
        size = 1 + (farthest == num_slots).to(tl.int32)
        return farthest + (size << COUNT), tl.minimum(farthest, num_slots - 1), moved - size


@triton.jit
def columns_read(number, columns, initial, TREE: tl.constexpr):
    """The carried columns that a run reads. The prefix of an initial state, if any, may be in the last one."""
    if TREE.radix_log == 1:
        last = columns - 1
        bits = (number & ((1 << last) - 1)) | (((number >> last) > 0) | (initial is not None)).to(tl.int32) << last
        return tl.where(columns > 0, bits, 0)
    else:
        # The last column is all from it on: the first one of the next digit, which `first_column` takes back.
        last = tl.maximum(columns - 1, 0)
        height, nearer = height_of(last, TREE), last % TREE.others
        own = number >> height
        is_last = ((own > nearer) | (initial is not None)).to(tl.int32)
        digits = (number & ((1 << height) - 1)) | tl.minimum(own & TREE.others, nearer) << height
        digits |= is_last << (height + TREE.radix_log)
        heights = tl.minimum(tl.arange(0, MOST_BITS) * TREE.radix_log, 31)
        count = tl.sum((digits >> heights) & TREE.others, 0)
        return tl.where(columns > 0, digits + (count << COUNT), 0)


@triton.jit
def is_column_read(number, column, columns, initial, TREE: tl.constexpr):
    """Is a column among the `columns_read`?"""
    if TREE.radix_log == 1:
        return (columns_read(number, columns, initial, TREE) >> column) & 1
    else:
        digit = number >> height_of(column, TREE)
        is_last = (digit > column % TREE.others) | (initial is not None)
        digit = tl.where(column == columns - 1, tl.where(is_last, TREE.others, 0), digit & TREE.others)
        return ((column < columns) & (digit > column % TREE.others)).to(tl.int32)


@triton.jit
def older_column(place, tier):
    """The carried column that is brought on into a place, or -1."""
    older = place - tier.num_slots + tier.collapsed
    return tl.where(older < tier.columns, older, -1)

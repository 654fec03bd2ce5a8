"""Rows of length 1, x / sqrt(|x|^2 + 1e-6), as factors of products of raw rows; and the lengths of blocks."""

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-6)  # that of `loglinear.ops.problem.unit_length`


@triton.jit
def inverse_squares(x, UNIT: tl.constexpr):
    """The square of the factor that gives each row its length 1. UNIT: the rows have this length already."""
    x = x.to(tl.float32)
    squares = tl.sum(x * x, 1)
    if UNIT:
        return tl.full(squares.shape, 1.0, tl.float32)
    else:
        return 1.0 / (squares + EPSILON)


@triton.jit
def shortfalls(x, inverse, UNIT: tl.constexpr):
    """1 minus the square of each row's length: epsilon's share, or how far UNIT rows miss 1."""
    if UNIT:
        x = x.to(tl.float32)
        return 1.0 - tl.sum(x * x, 1)
    else:
        return EPSILON * inverse


@triton.jit
def first_of(first, chunk):
    """The position of the first token of a chunk's sequence. first: [N] of packed sequences, None if all are 0."""
    if first is not None:
        return tl.load(first + chunk.sequence)
    else:
        return tl.full([], 0, tl.int64)


@triton.jit
def tokens_from(first, begin, end, C: tl.constexpr):
    """The tokens of the chunks begin .. end - 1 at position `first` or later, as a float."""
    end = end.to(tl.int64) * C
    return tl.maximum(end - tl.maximum(begin.to(tl.int64) * C, first), 0).to(tl.float32)

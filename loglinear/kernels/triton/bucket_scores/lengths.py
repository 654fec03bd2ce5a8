"""Rows of length 1, x / sqrt(|x|^2 + 1e-6), as factors of products of raw rows."""

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

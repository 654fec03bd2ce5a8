"""Tricks against the compiler, each with its saving.

A compiler computes whatever does not change in a loop before the loop, and keeps it in registers. Masks and addresses
of whole tiles then end in local memory. `opaque_zero` does not change either, but the compiler cannot know.

Bytes of stack are those of a thread, by `python -m benchmarks.resources` with Triton 3.7.1 and without a GPU. Times are
of an H100 with Triton 3.6.0, at T 32,768 (docs/lab-notes/2026-11-23-scalar-gate-kernels.md).
"""

import triton
import triton.language as tl


@triton.jit
def opaque_zero(turn, use: tl.constexpr):
    """0, anew for every turn of a loop and every use in it. Turns are below 2**28.

    Saves, in all its uses, 272 of 456 bytes of stack in `in_chunk_backward` and 152 of 288 in `walk_backward`.
    """
    return turn >> (30 - use)


@triton.jit
def fresh_arange(turn, use: tl.constexpr, ROWS: tl.constexpr):
    """tl.arange(0, ROWS), anew for every turn of a loop and every use in it: no mask or address outlives its use.

    Saves 192 of 376 bytes of stack in `in_chunk_backward` and 152 of 288 in `walk_backward`. The first took 1.90 ms in
    place of 2.05.
    """
    return tl.arange(0, ROWS) + opaque_zero(turn, use)


@triton.jit
def fresh_zeros(turn, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros, anew for every turn: a product that is added to them stays in the loop.

    Saves nothing under Triton 3.7.1 (8 bytes of stack more in `in_chunk_backward`); not timed by itself.
    """
    return tl.zeros([ROWS, COLUMNS], tl.float32) + opaque_zero(turn, 0) * 1.0


@triton.jit
def prefetch(pointers, mask):
    """A load whose value the next turn of a loop takes through `prefetched`. 16-bit numbers become 32-bit integers,
    which the load itself does: a conversion, or packing two of them into one register, would wait for it.

    Saves that wait and no stack; not timed by itself.
    """
    if pointers.dtype.element_ty.primitive_bitwidth == 16:
        return tl.load(pointers.to(tl.pointer_type(tl.int16), bitcast=True), mask=mask, other=0).to(tl.int32)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def prefetched(x, dtype: tl.constexpr):
    """float32 of what `prefetch` has loaded from an array of this dtype."""
    if dtype.primitive_bitwidth == 16:
        return x.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    else:
        return x.to(tl.float32)


@triton.jit
def identity(SIZE: tl.constexpr, MATH: tl.constexpr):
    i = tl.arange(0, SIZE)
    return (i[:, None] == i[None, :]).to(tl.float32).to(MATH.dot)


@triton.jit
def to_mma_layout(x, one, MATH: tl.constexpr):
    """float32 x times the identity: laid out over the threads as a product's result, which other products take as it
    is. A loaded tile is laid out for its load, and would go through shared memory for each product of its multiples.

    Saves 40 of 176 bytes of stack in `walk_backward`, which took 1.97 ms in place of 2.1.
    """
    return tl.dot(x, one, input_precision=MATH.precision)

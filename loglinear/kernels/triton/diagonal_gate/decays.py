"""The decays inside a chunk, for each channel of the keys.

A chunk's triangle is cut as the Fenwick tree cuts it. The pairs (i, j) at level l have i in the right half and j in the
left half of one aligned block of 2**(l + 1) tokens. With E the decay between a token and the middle of its block,

    exp(G_i - G_j) = E_i E_j,     scores at level l = (Q * E)(K * E)^T where (i, j) is such a pair

Every exponent is the sum of the log decays that it stands for. None is above 0, so nothing overflows, and none is a
difference of longer sums, which would lose its digits behind a strong gate. The sums are products with a matrix of
zeros and ones.
"""

# i, t, j tokens of a chunk, C chunk
import triton
import triton.language as tl

from loglinear.kernels.triton.tiles import LOG2_E, MIN_LOG_DECAY, load_rows


@triton.jit
def load_gates(base, stride, n, first_channel, C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """The base-2 log decays [C, BK] of a chunk; 0 for tokens that are not there."""
    g_CB = load_rows(base, stride, n, first_channel, C, K, BK).to(tl.float32)
    return tl.maximum(g_CB, MIN_LOG_DECAY) * LOG2_E


@triton.jit
def sums(chosen_CC, x_CB, MATH: tl.constexpr):
    """chosen @ x for a mask and float32 numbers, which are not rounded: in bfloat16 they are a high and a low half."""
    chosen = chosen_CC.to(tl.float32)
    if MATH.dot == tl.bfloat16:
        chosen = chosen.to(tl.bfloat16)
        high = x_CB.to(tl.bfloat16)
        low = (x_CB - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(chosen, low, tl.dot(chosen, high))
    else:
        return tl.dot(chosen, x_CB, input_precision="tf32x3")


@triton.jit
def to_middle(level, C: tl.constexpr):
    """[i, t]: does the decay of token t lie between token i and the middle of its block of 2**(level + 1)?"""
    i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    is_right = ((i >> level) & 1) == 1
    return ((i >> level) == (t >> level)) & (((t <= i) & is_right) | ((t > i) & (is_right == 0)))


@triton.jit
def from_middle(level, C: tl.constexpr):
    """[t, i]: `to_middle`, transposed."""
    t, i = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    is_right = ((i >> level) & 1) == 1
    return ((i >> level) == (t >> level)) & (((t <= i) & is_right) | ((t > i) & (is_right == 0)))


@triton.jit
def are_pairs(level, C: tl.constexpr):
    """[i, j]: is token i in the right half and token j in the left half of one block of 2**(level + 1)?"""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return (i > j) & (((i >> level) ^ (j >> level)) == 1)


@triton.jit
def not_after(C: tl.constexpr):
    """[i, t]: is t at or before i?"""
    return tl.arange(0, C)[None, :] <= tl.arange(0, C)[:, None]


@triton.jit
def after(C: tl.constexpr):
    """[i, t]: is t behind i?"""
    return tl.arange(0, C)[None, :] > tl.arange(0, C)[:, None]


@triton.jit
def is_own(C: tl.constexpr):
    """[i, j]: the diagonal."""
    return tl.arange(0, C)[None, :] == tl.arange(0, C)[:, None]

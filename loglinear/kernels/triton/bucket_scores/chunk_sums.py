"""Each chunk's own sum, without its mean for random keys.

M_z = K^T diag(1 / |k|^2) K - n / K I

The chunk has n = C tokens, or fewer if its sequence starts in it. The places before that token hold zeros.
"""

# C chunk, G groups, K key
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import SIZES, Sizes
from loglinear.kernels.triton.bucket_scores.inputs import Inputs
from loglinear.kernels.triton.bucket_scores.lengths import first_of, inverse_squares, tokens_from
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import Launch
from loglinear.kernels.triton.tiles import head_program, load_rows, locate, rows_at, store_state


@launcher
@triton.jit(do_not_specialize=SIZES)
def chunk_sums_kernel(
    k,
    slots,
    first,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    UNIT: tl.constexpr,
    MATH: tl.constexpr,
):
    """One chunk, one group, BV columns of its sum. Nothing reads the sum of an unfinished chunk."""
    sizes = Sizes(T, N, H, R, L, cap)
    TILES: tl.constexpr = (K + BV - 1) // BV
    tile, h, c = head_program(TILES, sizes.H)
    chunk = locate(c.to(tl.int64), table, sizes, C)
    if chunk.n <= 0:
        return
    rows = rows_at(k, chunk, h)
    k_CK = load_rows(rows, k.t, chunk.n, 0, C, K, BK)
    k_CV = load_rows(rows, k.t, chunk.n, tile * BV, C, K, BV)
    unit_CV = (k_CV.to(tl.float32) * inverse_squares(k_CK, UNIT)[:, None]).to(MATH.dot)
    sum_KV = tl.dot(tl.trans(k_CK.to(MATH.dot)), unit_CV, input_precision=MATH.precision)
    on_diagonal = tl.arange(0, BK)[:, None] == tile * BV + tl.arange(0, BV)[None, :]
    mean = C / K
    if first is not None:
        held = tokens_from(first_of(first, chunk), chunk.z, chunk.z + 1, C)
        mean = tl.where(held == C, C / K, held / K)  # divisions of tensors may be inexact
    sum_KV -= tl.where(on_diagonal, mean, 0.0)
    store_state(slots + (chunk.c * sizes.H + h) * (K * K), tile * BV, sum_KV, K, K, BK, BV)


def chunk_sums(x: Inputs, launch: Launch) -> Tensor:
    """[chunk, G, K, K]: the Fenwick array with every chunk's own sum in its slot."""
    slots = x.empty(x.layout.chunks, x.groups, x.key_dim, x.key_dim, dtype=x.dtype)
    grid = x.layout.chunks * x.groups * x.value_tiles(launch)
    # A single tf32 product cuts digits off. That makes every sum of squares too small, and the mean would not fit it.
    constants = x.row_constants(launch) | dict(MATH=x.math._replace(precision="tf32x3"))
    chunk_sums_kernel[(grid,)](x.k, slots, x.first, x.layout.table, *x.sizes, **constants)
    return slots

"""The reads of a chunk's queries inside their own chunk, differentiated as far as the scores A.

dA = (dO V^T) * LAM        dV = (A * LAM)^T dO        dlambda[i, l] = sum over j at level l of (dO V^T * A)[i, j]
"""

# C chunk, H heads, V value, L levels
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import SIZES, Rows, Sizes, Slab
from loglinear.kernels.triton.diagonal_gate.decays import not_after
from loglinear.kernels.triton.diagonal_gate.states import Inputs
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import Launch
from loglinear.kernels.triton.levels import (
    far_classes,
    load_class_scales,
    near_classes,
    spread_scales,
    store_column_sums,
)
from loglinear.kernels.triton.tiles import head_program, load_rows, locate, rows_at, slab_at, store_rows


@launcher
@triton.jit(do_not_specialize=SIZES)
def scores_backward_kernel(
    v,
    level_scales,
    scores,
    do,
    dscores,
    dv,
    dlevel_scales,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    scale,
    V: tl.constexpr,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    BV: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One chunk, one head. Writes dscores, dv and the first COLUMNS of dlevel_scales, the only one where all reads have
    one column."""
    sizes = Sizes(T, N, H, R, L, cap)
    DTYPE: tl.constexpr = level_scales.data.dtype.element_ty
    TILES: tl.constexpr = (V + BV - 1) // BV
    LINEAR: tl.constexpr = COLUMNS == 1
    _, h, c = head_program(1, sizes.H)
    chunk = locate(c.to(tl.int64), table, sizes, C)
    n = chunk.n
    if n <= 0:
        return
    i = tl.arange(0, C)
    near_JC, far_JC = near_classes(C).to(tl.float32).to(MATH.dot), far_classes(C).to(tl.float32).to(MATH.dot)
    v_rows, do_rows, dv_rows = rows_at(v, chunk, h), rows_at(do, chunk, h), slab_at(dv, chunk, sizes, h, V)
    l_t = level_scales.t
    lambdas = load_class_scales(rows_at(level_scales, chunk, h), l_t, n, L, 0, i, LINEAR, TREE)
    tile_CC = (chunk.c * sizes.H + h) * (C * C) + (i[:, None] * C + i[None, :])
    scores_CC = tl.load(scores + tile_CC)
    pulled_CC = tl.zeros([C, C], tl.float32)
    for tile in range(TILES):
        v_CV = load_rows(v_rows, v.t, n, tile * BV, C, V, BV).to(MATH.dot)
        do_CV = load_rows(do_rows, do.t, n, tile * BV, C, V, BV).to(MATH.dot)
        pulled_CC += tl.dot(do_CV, tl.trans(v_CV), input_precision=MATH.precision)
    scales_CC = spread_scales(lambdas, l_t, n, L, near_JC, far_JC, i, DTYPE, C, LINEAR, TREE, MATH) * scale
    dscores_CC = tl.where(not_after(C), pulled_CC * scales_CC, 0.0)
    tl.store(dscores + tile_CC, dscores_CC.to(dscores.dtype.element_ty))
    read_CC = (scores_CC * scales_CC).to(MATH.dot)
    for tile in range(TILES):
        do_CV = load_rows(do_rows, do.t, n, tile * BV, C, V, BV).to(MATH.dot)
        dv_CV = tl.dot(tl.trans(read_CC), do_CV, input_precision=MATH.precision)
        store_rows(dv_rows, dv.t, n, tile * BV, dv_CV, C, V, BV)
    pulled_CC *= scores_CC
    dscales = slab_at(dlevel_scales, chunk, sizes, h, L)
    if LINEAR:
        total = tl.sum(pulled_CC, 1) * scale
        tl.store(dscales + i * dlevel_scales.t, total.to(dlevel_scales.data.dtype.element_ty), mask=i < n)
    else:
        store_column_sums(dscales, dlevel_scales.t, n, L, pulled_CC, scale, near_JC, far_JC, i, C, COLUMNS, TREE, MATH)


def scores_backward(x: Inputs, scores: Tensor, do: Rows, dv: Slab, dlevel_scales: Slab, launch: Launch) -> Tensor:
    """Write dv of the reads inside the chunks, and dlambda of their levels; return dA [chunk, H, C, C]."""
    dscores = x.empty(*scores.shape, dtype=x.dtype)
    constants = {name: value for name, value in x.constants(launch).items() if name not in ("K", "BK")}
    scores_backward_kernel[(x.layout.chunks * x.heads,)](
        x.v,
        x.level_scales,
        scores,
        do,
        dscores,
        dv,
        dlevel_scales,
        x.layout.table,
        *x.sizes,
        x.scale,
        COLUMNS=1 if x.is_one_level else x.columns,
        TREE=x.tree,
        **constants,
    )
    return dscores

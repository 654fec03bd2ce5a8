"""The adjoint of a chunk's own state S_z = K'^T V, whose keys K' have decayed to the chunk's end.

dV += K' dS          dK' = V dS^T
"""

# C chunk, H heads, K key, V value
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import SIZES, Sizes, Slab
from loglinear.kernels.triton.diagonal_gate.states import Inputs
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import Launch
from loglinear.kernels.triton.tiles import head_program, load_rows, load_state, locate, rows_at, slab_at, store_rows


@launcher
@triton.jit(do_not_specialize=SIZES)
def writes_backward_kernel(
    k,
    v,
    dslots,
    dk,
    dv,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    MATH: tl.constexpr,
):
    """One chunk, one head. Writes dk and adds to dv."""
    sizes = Sizes(T, N, H, R, L, cap)
    TILES: tl.constexpr = (V + BV - 1) // BV
    _, h, c = head_program(1, sizes.H)
    chunk = locate(c.to(tl.int64), table, sizes, C)
    n = chunk.n
    if n <= 0:
        return
    v_rows, dv_rows = rows_at(v, chunk, h), slab_at(dv, chunk, sizes, h, V)
    dstate = dslots + (chunk.c * sizes.H + h) * (K * V)
    k_CK = load_rows(rows_at(k, chunk, h), k.t, n, 0, C, K, BK).to(MATH.dot)
    dk_CK = tl.zeros([C, BK], tl.float32)
    for tile in range(TILES):
        in_chunk_CV = load_rows(dv_rows, dv.t, n, tile * BV, C, V, BV).to(tl.float32)
        v_CV = load_rows(v_rows, v.t, n, tile * BV, C, V, BV).to(MATH.dot)
        dstate_KV = load_state(dstate, tile * BV, K, V, BK, BV)
        dk_CK += tl.dot(v_CV, tl.trans(dstate_KV), input_precision=MATH.precision)
        dv_CV = in_chunk_CV + tl.dot(k_CK, dstate_KV, input_precision=MATH.precision)
        store_rows(dv_rows, dv.t, n, tile * BV, dv_CV, C, V, BV)
    store_rows(dk + (chunk.c * sizes.H + h) * (C * K), K, n, 0, dk_CK, C, K, BK)


def writes_backward(x: Inputs, dslots: Tensor, dk: Tensor, dv: Slab, launch: Launch) -> None:
    """Write the gradient [chunk, H, C, K] of the decayed keys, and complete dv. dslots: of the chunks' own states."""
    writes_backward_kernel[(x.layout.chunks * x.heads,)](
        x.k, x.v, dslots, dk, dv, x.layout.table, *x.sizes, **x.constants(launch)
    )

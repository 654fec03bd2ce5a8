"""The reads between chunks, differentiated on the query's side.

    Y_l = dO S_l^T Diag(P_path)      dQ' = sum_l diag(lambda_l) Y_l      dlambda_l = rowsum(Q' * Y_l)

Q' are the queries with the decays from their chunk's start. The flow of a read, sum_i lambda_l (Q' * Y_l)_i [K], is the
gradient of the logarithms of the decays on its way.
"""

# C chunk, H heads, K key, V value, L levels
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import SIZES, Planes, Rows, Sizes, Slab
from loglinear.kernels.triton.compiler import prefetched
from loglinear.kernels.triton.diagonal_gate.states import Inputs
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import Launch
from loglinear.kernels.triton.levels import load_scale
from loglinear.kernels.triton.scalar_gate.states import Flows, States
from loglinear.kernels.triton.tiles import head_program, load_rows, load_state, locate, rows_at, slab_at, store_rows
from loglinear.kernels.triton.walks import after, candidate_at, load_channels, slot_pointer, start_of_walk, walk


@launcher
@triton.jit(do_not_specialize=SIZES)
def walk_backward_kernel(
    q,
    level_scales,
    states,
    do,
    dq,
    dlevel_scales,
    flows,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One chunk, one head. Writes dq, the flows of its reads, and the columns of dlevel_scales between chunks, adding
    to the one that the chunk's own reads share."""
    sizes = Sizes(T, N, H, R, L, cap)
    DTYPE: tl.constexpr = level_scales.data.dtype.element_ty
    TILES: tl.constexpr = (V + BV - 1) // BV
    _, h, c = head_program(1, sizes.H)
    chunk = locate(c.to(tl.int64), table, sizes, C)
    n = chunk.n
    if n <= 0:
        return
    i, channel, last = tl.arange(0, C), tl.arange(0, BK), L - 1
    scales, l_t, do_rows = rows_at(level_scales, chunk, h), level_scales.t, rows_at(do, chunk, h)
    to, to_t = slab_at(dlevel_scales, chunk, sizes, h, L), dlevel_scales.t
    q_CK = load_rows(rows_at(q, chunk, h), q.t, n, 0, C, K, BK).to(tl.float32)
    read, _, _ = walk(chunk, sizes.cap, TREE)
    stand = start_of_walk(read, chunk, TREE)
    row = (chunk.c * sizes.H + h) * K
    dq_CK, in_last = tl.zeros([C, BK], tl.float32), tl.zeros([C], tl.float32)
    path_K, flow_K = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)
    # lambda of a block is loaded one read ahead.
    ahead = load_scale(scales, l_t, n, TREE.column + candidate_at(stand, chunk, TREE), L, i)
    for _ in range(tl.sum(read.to(tl.int32), 0)):
        l = candidate_at(stand, chunk, TREE)
        stand = after(stand, TREE)
        weight = prefetched(ahead, DTYPE) * scale
        ahead = load_scale(scales, l_t, n, TREE.column + candidate_at(stand, chunk, TREE), L, i)
        state = slot_pointer(states, chunk, l, sizes, h, K * V, TREE)
        pulled_CK = tl.zeros([C, BK], tl.float32)
        for tile in range(TILES):
            do_CV = load_rows(do_rows, do.t, n, tile * BV, C, V, BV).to(MATH.dot)
            state_KV = load_state(state, tile * BV, K, V, BK, BV)
            pulled_CK += tl.dot(do_CV, tl.trans(state_KV), input_precision=MATH.precision)
        pulled_CK *= tl.exp2(path_K)[None, :]
        dscale = tl.sum(q_CK * pulled_CK, 1) * scale
        in_last += tl.where(l < sizes.cap, 0.0, dscale)
        to_column = to + i * to_t + TREE.column + l
        tl.store(to_column, dscale.to(to.dtype.element_ty), mask=i < tl.where(l < sizes.cap, n, 0))
        pulled_CK *= weight[:, None]
        dq_CK += pulled_CK
        flow_K += tl.sum(q_CK * pulled_CK, 0)
        tl.store(flows.until.data + l * flows.until.plane + row + channel, flow_K, mask=channel < K)
        path_K += load_channels(states.log_decay, chunk, l, sizes, h, K, BK, TREE)
    tl.store(flows.whole + row + channel, flow_K, mask=channel < K)
    store_rows(dq + row * C, K, n, 0, dq_CK, C, K, BK)
    if last < TREE.column:  # the chunk's own reads are in the last column too
        in_last += tl.load(to + i * to_t + last, mask=i < n, other=0.0).to(tl.float32)
    tl.store(to + i * to_t + last, in_last.to(to.dtype.element_ty), mask=i < n)


def walk_backward(x: Inputs, states: States, do: Rows, dq: Tensor, dlevel_scales: Slab, launch: Launch) -> Flows:
    """Write the gradient [chunk, H, C, K] of the decayed queries, and dlambda of the levels between chunks; return the
    flows."""
    y, H, K = x.layout, x.heads, x.key_dim
    until, whole = Planes.of(x.empty(y.reads, y.chunks, H, K)), x.empty(y.chunks, H, K)
    flows = Flows(until, whole, states.totals[0], states.totals[1])
    walk_backward_kernel[(y.chunks * H,)](
        x.q,
        x.level_scales,
        states,
        do,
        dq,
        dlevel_scales,
        flows,
        y.table,
        *x.sizes,
        x.scale,
        TREE=x.tree,
        **x.constants(launch),
    )
    return flows

"""The adjoint of `decayed_rows`: the gradients of queries, keys and log decays.

    dQ = dQ' * exp(G) + sum_l (dA_l (K * E_l)) * E_l          dK = dK' * exp(Gam - G) + sum_l (dA_l^T (Q * E_l)) * E_l

dA_l are the pairs at level l, E_l the decays to the middles of their blocks (decays.py). The gradient of a log decay is
the sum of the flows through its token: of every product with a factor exp(... + g_t + ...), that product times its
gradient; and of the whole chunk, from the sweeps. No flow is subtracted from another.
"""

# C chunk, G groups, H heads, K key
import triton
import triton.language as tl

from loglinear.kernels.triton.args import SIZES, Planes, Sizes, Slab
from loglinear.kernels.triton.diagonal_gate.decays import (
    after,
    are_pairs,
    from_middle,
    is_own,
    load_gates,
    not_after,
    sums,
    to_middle,
)
from loglinear.kernels.triton.diagonal_gate.states import DecayedGradients, Inputs
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import Launch, ceil_div
from loglinear.kernels.triton.scalar_gate.states import Totals
from loglinear.kernels.triton.tiles import (
    MIN_LOG_DECAY,
    head_program,
    load_rows,
    locate,
    rows_at,
    slab_at,
    store_rows,
)


@triton.jit
def load_across(
    dtotals, chunk, sizes, h, first, K, BK: tl.constexpr, C: tl.constexpr, TIERS, PARTS, TREE: tl.constexpr
):
    """The gradient [BK] of a whole chunk's log decay: those of its entries' totals, one for each tier."""
    channel = first + tl.arange(0, BK)
    count = chunk.z + ((chunk.end - chunk.first + C - 1) // C).to(tl.int32)
    across = tl.zeros([BK], tl.float32)
    for tier in range(TIERS):
        entry = (((chunk.z >> (TREE.tier * tier)) + 1) << (TREE.tier * tier)) - 1
        row = ((chunk.c - chunk.z + entry) * sizes.H + h) * K
        mask = channel < tl.where(entry < count, K, 0)
        for part in range(PARTS):
            source = dtotals.data + tier * dtotals.tier + part * dtotals.part + row
            across += tl.load(source + channel, mask=mask, other=0.0)
    return across


@launcher
@triton.jit(do_not_specialize=SIZES)
def decayed_rows_backward_kernel(
    q,
    k,
    log_decay,
    gradients,
    dtotals,
    dq,
    dk,
    dlog_decay,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    K: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    TIERS: tl.constexpr,
    PARTS: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One chunk, one head, one tile of the channels. Writes dq and dk, each in the head's plane, and dlog_decay."""
    sizes = Sizes(T, N, H, R, L, cap)
    TILES: tl.constexpr = (K + BK - 1) // BK
    tile, h, c = head_program(TILES, sizes.H)
    chunk = locate(c.to(tl.int64), table, sizes, C)
    n, first, group = chunk.n, tile * BK, h // sizes.R
    if n <= 0:
        return
    i = tl.arange(0, C)
    g_rows = rows_at(log_decay, chunk, h)
    g_CB = load_gates(g_rows, log_decay.t, n, first, C, K, BK)
    q_CB = load_rows(rows_at(q, chunk, group), q.t, n, first, C, K, BK).to(tl.float32)
    k_CB = load_rows(rows_at(k, chunk, group), k.t, n, first, C, K, BK).to(tl.float32)
    # Reads of the past pass all tokens from the chunk's start, gifts to the future all tokens to its end.
    decay_CB = tl.exp2(sums(not_after(C), g_CB, MATH))
    dq_CB = load_rows(rows_at(gradients.q, chunk, h), gradients.q.t, n, first, C, K, BK) * decay_CB
    dg_CB = sums(is_own(C) | after(C), q_CB * dq_CB, MATH)
    decay_CB = tl.exp2(sums(after(C), g_CB, MATH))
    dk_CB = load_rows(rows_at(gradients.k, chunk, h), gradients.k.t, n, first, C, K, BK) * decay_CB
    dg_CB += sums(not_after(C) & (is_own(C) == 0), k_CB * dk_CB, MATH)
    dg_CB += load_across(dtotals, chunk, sizes, h, first, K, BK, C, TIERS, PARTS, TREE)[None, :]

    dscores_CC = tl.load(gradients.scores + (chunk.c * sizes.H + h) * (C * C) + (i[:, None] * C + i[None, :]))
    own = tl.sum(tl.where(is_own(C), dscores_CC.to(tl.float32), 0.0), 1)[:, None]
    dq_CB += own * k_CB
    dk_CB += own * q_CB
    for level in range(LEVELS):
        decay_CB = tl.exp2(sums(to_middle(level, C), g_CB, MATH))
        dpairs_CC = tl.where(are_pairs(level, C), dscores_CC.to(tl.float32), 0.0).to(MATH.dot)
        left_CB = (k_CB * decay_CB).to(MATH.dot)
        dright_CB = tl.dot(dpairs_CC, left_CB, input_precision=MATH.precision) * decay_CB
        dq_CB += dright_CB
        right_CB = (q_CB * decay_CB).to(MATH.dot)
        dleft_CB = tl.dot(tl.trans(dpairs_CC), right_CB, input_precision=MATH.precision) * decay_CB
        dk_CB += dleft_CB
        dg_CB += sums(from_middle(level, C), q_CB * dright_CB + k_CB * dleft_CB, MATH)
    token = ((chunk.b * sizes.T + chunk.first) * (sizes.H // sizes.R) + group) * K
    stride, plane = sizes.H // sizes.R * K, (h % sizes.R).to(tl.int64)
    store_rows(dq.data + plane * dq.plane + token, stride, n, first, dq_CB, C, K, BK)
    store_rows(dk.data + plane * dk.plane + token, stride, n, first, dk_CB, C, K, BK)
    g_CB = load_rows(g_rows, log_decay.t, n, first, C, K, BK).to(tl.float32)
    dg_CB = tl.where(g_CB < MIN_LOG_DECAY, 0.0, dg_CB)
    store_rows(slab_at(dlog_decay, chunk, sizes, h, K), dlog_decay.t, n, first, dg_CB, C, K, BK)


def decayed_rows_backward(
    x: Inputs,
    gradients: DecayedGradients,
    dtotals: Totals,
    dq: Planes,
    dk: Planes,
    dlog_decay: Slab,
    launch: Launch,
) -> None:
    """Write the gradients of the queries, the keys and the log decays of a call before its rows have decayed."""
    tiers, parts = dtotals.data.shape[:2]
    tiles = ceil_div(x.key_dim, x.channel_tile(launch))
    decayed_rows_backward_kernel[(x.layout.chunks * x.heads * tiles,)](
        x.q,
        x.k,
        x.log_decay,
        gradients,
        dtotals,
        dq,
        dk,
        dlog_decay,
        x.layout.table,
        *x.sizes,
        TIERS=tiers,
        PARTS=parts,
        TREE=x.tree,
        **x.channel_constants(launch),
    )

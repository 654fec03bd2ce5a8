"""The adjoint of `decayed_rows`: the gradients of queries, keys and log decays.

    dQ = dQ' * exp(G) + sum_l (dA_l (K * E_l)) * E_l          dK = dK' * exp(Gam - G) + sum_l (dA_l^T (Q * E_l)) * E_l

dA_l are the pairs at level l, E_l the decays to the middles of their blocks (decays.py). For the delta rule dK also has
what the keys that the past sees give, and the products dN of keys: sum_l ((dN_l + dN_l^T) (K * E_l)) * E_l.

The gradient of a log decay is the sum of the flows through its token: of every product with a factor exp(... + g_t +
...), that product times its gradient; and of the whole chunk, from the sweeps or from its transition. No flow is
subtracted from another.
"""

# C chunk, G groups, H heads, K key
from typing import NamedTuple

import triton
import triton.language as tl

from loglinear.kernels.triton.args import SIZES, Math, Sizes, Slab
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
from loglinear.kernels.triton.diagonal_gate.states import DecayedGradients, channel_constants, channel_tile
from loglinear.kernels.triton.inputs import Inputs
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import Launch, ceil_div
from loglinear.kernels.triton.tiles import (
    MIN_LOG_DECAY,
    head_program,
    load_rows,
    locate,
    rows_at,
    slab_at,
    store_rows,
)


class Rowwise(NamedTuple):
    """The gradients that this stage writes: of each head's queries and keys, and of its log decays, [B,T,H,K]."""

    dq: Slab
    dk: Slab
    dlog_decay: Slab


@triton.jit
def load_across(
    gradients, g_CB, chunk, sizes, h, first, K, BK: tl.constexpr, C: tl.constexpr, TIERS, PARTS, TREE: tl.constexpr
):
    """The gradient [BK] of a whole chunk's log decay: those of its entries' totals, one for each tier; or from that of
    its transition, whose diagonal has the decay."""
    channel = first + tl.arange(0, BK)
    if gradients.transitions is not None:
        diagonal = gradients.transitions + (chunk.c * sizes.H + h) * (K * K) + channel * (K + 1)
        return tl.load(diagonal, mask=channel < K, other=0.0).to(tl.float32) * tl.exp2(tl.sum(g_CB, 0))
    else:
        return sum_of_tiers(gradients.totals, channel, chunk, sizes, h, K, BK, C, TIERS, PARTS, TREE)


@triton.jit
def sum_of_tiers(
    dtotals, channel, chunk, sizes, h, K, BK: tl.constexpr, C: tl.constexpr, TIERS, PARTS, TREE: tl.constexpr
):
    """The gradients [BK] of the entries that a chunk is in, one of each tier."""
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
    to,
    table,
    T,
    N,
    H,
    R,
    L,
    cap,
    scale,
    K: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    TIERS: tl.constexpr,
    PARTS: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One chunk, one head, one tile of the channels. Writes dq and dk of the head, and dlog_decay."""
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
    q_CB = load_rows(rows_at(q, chunk, group), q.t, n, first, C, K, BK).to(tl.float32) * scale
    k_CB = load_rows(rows_at(k, chunk, group), k.t, n, first, C, K, BK).to(tl.float32)
    # Reads of the past pass all tokens from the chunk's start, gifts to the future all tokens to its end.
    decay_CB = tl.exp2(sums(not_after(C), g_CB, MATH))
    row = chunk.c * sizes.H + h
    dq_CB = load_rows(gradients.q + row * (C * K), K, n, first, C, K, BK).to(tl.float32) * decay_CB
    flow_CB = q_CB * dq_CB
    if gradients.seen is not None:
        seen = slab_at(gradients.seen, chunk, sizes, h, K)
        dseen_CB = load_rows(seen, gradients.seen.t, n, first, C, K, BK) * decay_CB
        flow_CB += k_CB * dseen_CB
    dg_CB = sums(is_own(C) | after(C), flow_CB, MATH)
    decay_CB = tl.exp2(sums(after(C), g_CB, MATH))
    dk_CB = load_rows(gradients.k + row * (C * K), K, n, first, C, K, BK) * decay_CB
    dg_CB += sums(not_after(C) & (is_own(C) == 0), k_CB * dk_CB, MATH)
    dg_CB += load_across(gradients, g_CB, chunk, sizes, h, first, K, BK, C, TIERS, PARTS, TREE)[None, :]
    if gradients.seen is not None:
        dk_CB += dseen_CB

    tile_CC = row * (C * C) + (i[:, None] * C + i[None, :])
    dscores_CC = tl.load(gradients.scores + tile_CC)
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
        if gradients.products is not None:
            dpairs_CC = tl.load(gradients.products + tile_CC).to(tl.float32)
            dpairs_CC = tl.where(are_pairs(level, C), dpairs_CC, 0.0).to(MATH.dot)
            dleft_CB += tl.dot(dpairs_CC, left_CB, input_precision=MATH.precision) * decay_CB
            dleft_CB += tl.dot(tl.trans(dpairs_CC), left_CB, input_precision=MATH.precision) * decay_CB
        dk_CB += dleft_CB
        dg_CB += sums(from_middle(level, C), q_CB * dright_CB + k_CB * dleft_CB, MATH)
    store_rows(slab_at(to.dq, chunk, sizes, h, K), to.dq.t, n, first, dq_CB * scale, C, K, BK)
    store_rows(slab_at(to.dk, chunk, sizes, h, K), to.dk.t, n, first, dk_CB, C, K, BK)
    g_CB = load_rows(g_rows, log_decay.t, n, first, C, K, BK).to(tl.float32)
    dg_CB = tl.where(g_CB < MIN_LOG_DECAY, 0.0, dg_CB)
    store_rows(slab_at(to.dlog_decay, chunk, sizes, h, K), to.dlog_decay.t, n, first, dg_CB, C, K, BK)


def decayed_rows_backward(
    x: Inputs, gradients: DecayedGradients, to: Rowwise, scale: float, math: Math, launch: Launch
) -> None:
    """Write the gradients of the queries, the keys and the log decays of a call before its rows have decayed."""
    tiers, parts = (0, 0) if gradients.totals is None else gradients.totals.data.shape[:2]
    tiles = ceil_div(x.key_dim, channel_tile(x.key_dim, launch))
    decayed_rows_backward_kernel[(x.layout.chunks * x.heads * tiles,)](
        x.q,
        x.k,
        x.log_decay,
        gradients,
        to,
        x.layout.table,
        *x.sizes,
        scale,
        TIERS=tiers,
        PARTS=parts,
        TREE=x.tree,
        MATH=math,
        **channel_constants(x, launch),
    )

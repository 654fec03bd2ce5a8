"""The keys of a chunk, differentiated: everything that they are read for.

    dK = diag(exp(Gam - G)) dKd - diag(b exp(G)) dR_K + (dN' + dN'^T) K + (dS * dec)^T Q

The second term is there already, from `writes_backward`. A chunk of 128 is two parts of 64 tokens; tiles above the
diagonal are neither computed nor read.
"""

# C chunk, J tokens of a part, H heads, K key
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import Sizes, Slab
from loglinear.kernels.triton.delta_rule.states import SIZES, Inputs, InsideGradients, Lower
from loglinear.kernels.triton.delta_rule.tiles import HeadRows, decay, head_rows, load_tile, load_tokens, rows_from
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.tiles import head_program, load_block, load_rows, locate, slab_at, store_rows


class KeysPart(NamedTuple):
    """A part of n tokens, in a chunk of n_keys. dk begins with the part, all others with the chunk."""

    n: tl.tensor
    n_keys: tl.tensor
    q: HeadRows
    k: HeadRows
    dk: HeadRows
    cumulative: tl.tensor
    dscores: tl.tensor
    dkeys: tl.tensor
    dlower: tl.tensor


@triton.jit
def keys_part(
    x,
    t,
    scale,
    K: tl.constexpr,
    C: tl.constexpr,
    J: tl.constexpr,
    TK: tl.constexpr,
    EARLIER: tl.constexpr,
    LATER: tl.constexpr,
    MATH: tl.constexpr,
):
    """The tile of columns from t on, of one part. EARLIER, LATER: there is one before it, behind it."""
    own: tl.constexpr = J if EARLIER else 0
    i, n, n_first, n_later = tl.arange(0, J), x.n, tl.minimum(x.n_keys, J), x.n_keys - J
    G = load_tokens(x.cumulative, own, J)
    to_end = tl.exp2(tl.load(x.cumulative + (C - 1)) - G)
    dk_JT = load_block(x.dkeys, own, t, C, K, J, TK).to(tl.float32) * to_end[:, None]
    dk_JT += load_rows(x.dk.data, x.dk.t, n, t, J, K, TK).to(tl.float32)
    k_own, q_own = rows_from(x.k, own), rows_from(x.q, own)
    k_JT, dlower_JJ = load_rows(k_own.data, k_own.t, n, t, J, K, TK).to(MATH.dot), load_tile(x.dlower, own, own, C, J)
    dk_JT = tl.dot(dlower_JJ, k_JT, dk_JT, input_precision=MATH.precision)
    dlower_JJ = tl.trans(load_tile(x.dlower, own, own, C, J, t))  # again, and not kept: registers for one program more
    dk_JT = tl.dot(dlower_JJ, k_JT, dk_JT, input_precision=MATH.precision)
    dscores_JJ = load_tile(x.dscores, own, own, C, J).to(tl.float32) * (decay(G, G, i, J) * scale)
    q_JT = load_rows(q_own.data, q_own.t, n, t, J, K, TK).to(MATH.dot)
    dk_JT = tl.dot(tl.trans(dscores_JJ.to(MATH.dot)), q_JT, dk_JT, input_precision=MATH.precision)
    if EARLIER:
        k_JT = load_rows(x.k.data, x.k.t, n_first, t, J, K, TK).to(MATH.dot)
        dk_JT = tl.dot(load_tile(x.dlower, own, 0, C, J), k_JT, dk_JT, input_precision=MATH.precision)
    if LATER:
        k_later, q_later = rows_from(x.k, J), rows_from(x.q, J)
        k_JT = load_rows(k_later.data, k_later.t, n_later, t, J, K, TK).to(MATH.dot)
        dk_JT = tl.dot(tl.trans(load_tile(x.dlower, J, 0, C, J)), k_JT, dk_JT, input_precision=MATH.precision)
        crossing = tl.exp2(load_tokens(x.cumulative, J, J)[:, None] - G[None, :]) * scale
        dscores_JJ = load_tile(x.dscores, J, 0, C, J).to(tl.float32) * crossing
        q_JT = load_rows(q_later.data, q_later.t, n_later, t, J, K, TK).to(MATH.dot)
        dk_JT = tl.dot(tl.trans(dscores_JJ.to(MATH.dot)), q_JT, dk_JT, input_precision=MATH.precision)
    store_rows(x.dk.data, x.dk.t, n, t, dk_JT, J, K, TK)


@launcher
@triton.jit(do_not_specialize=SIZES)
def keys_backward_kernel(
    q,
    k,
    cumulative,
    dscores,
    dkeys,
    dlower,
    dk,
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
    PARTS: tl.constexpr,
    TK: tl.constexpr,
    MATH: tl.constexpr,
):
    """C / PARTS tokens of one chunk, one head, one tile of columns: adds to dk [B, T, H, K] what dKd, dN' and dS
    give."""
    sizes = Sizes(T, N, H, R, L, cap)
    J: tl.constexpr = C // PARTS
    TILES: tl.constexpr = (K + TK - 1) // TK
    tile, h, c = head_program(TILES * PARTS, sizes.H)
    part, t = tile // TILES, tile % TILES * TK
    chunk = locate(c.to(tl.int64), table, sizes, C)
    n = tl.minimum(chunk.n - part * J, J)
    if n <= 0:
        return
    row = chunk.c * sizes.H + h
    x = KeysPart(
        n,
        chunk.n,
        head_rows(q, chunk, h // sizes.R),
        head_rows(k, chunk, h // sizes.R),
        rows_from(HeadRows(slab_at(dk, chunk, sizes, h, K), dk.t), part * J),
        cumulative + row * C,
        dscores + row * (C * C),
        dkeys + row * (C * K),
        dlower + row * (C * C),
    )
    if part == 0:
        keys_part(x, t, scale, K, C, J, TK, False, PARTS > 1, MATH)
    elif PARTS > 1:
        keys_part(x, t, scale, K, C, J, TK, True, False, MATH)


def keys_backward(
    x: Inputs, cumulative: Tensor, dinside: InsideGradients, dkeys: Tensor, lower: Lower, dk: Slab
) -> None:
    """Complete dk."""
    parts = x.tiling.parts("keys_backward")
    keys_backward_kernel[(x.layout.chunks * parts * x.heads * x.tiling.key_tiles("keys_backward"),)](
        x.q,
        x.k,
        cumulative,
        dinside.dscores,
        dkeys,
        lower.dlower,
        dk,
        x.layout.table,
        *x.sizes,
        x.scale,
        C=x.chunk_size,
        PARTS=parts,
        **x.key_constants("keys_backward"),
    )

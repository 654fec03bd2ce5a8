"""Each chunk's own transition and state.

P_z = exp(Gam) I + D_z,   D_z = Kd^T Er,   S_z = Kd^T U
Er = A diag(-b exp(G)) K,   U = A diag(b) V,   Kd = diag(exp(Gam - G)) K

With a diagonal gate Kd and exp(G) * K come with their decays (`Decayed`), and G is 0.
"""

# C chunk, H heads, K key, V value
import triton
import triton.language as tl

from loglinear.kernels.triton.args import Sizes
from loglinear.kernels.triton.delta_rule.states import SIZES, Entries, Inputs, Saved, Totals
from loglinear.kernels.triton.delta_rule.tiles import head_rows, inverse_at, load_decays, load_strength, load_tile
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.tiles import head_program, load_rows, locate, store_block


@launcher
@triton.jit(do_not_specialize=SIZES)
def chunk_state_kernel(
    k,
    v,
    beta,
    saved,
    states,
    totals,
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
    TK: tl.constexpr,
    BV: tl.constexpr,
    TRANSITION: tl.constexpr,
    MATH: tl.constexpr,
):
    """One whole chunk, one head, one tile of columns: S, states [chunk, H, K, V], and Gam, totals [chunk, H].
    TRANSITION: D alone, where V is K and v are keys."""
    sizes = Sizes(T, N, H, R, L, cap)
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, c = head_program(TILES, sizes.H)
    column = tile * BV
    chunk = locate(c.to(tl.int64), table, sizes, C)
    row = chunk.c * sizes.H + h
    if totals is not None and not TRANSITION:
        tl.store(totals + row, tl.load(saved.cumulative + row * C + C - 1), mask=tile == 0)
    if chunk.n < C:
        return
    k_rows = head_rows(k, chunk, h // sizes.R)
    strength = load_strength(head_rows(beta, chunk, h), C, C)
    G, total = load_decays(saved.cumulative + row * C, C)
    inverse_CC = load_tile(inverse_at(saved, chunk, h, C), 0, 0, C, C)
    if TRANSITION:
        rows, weight = head_rows(v, chunk, h // sizes.R), -strength * tl.exp2(G)
    else:
        rows, weight = head_rows(v, chunk, h), strength
    v_CV = load_rows(rows.data, rows.t, C, column, C, V, BV).to(tl.float32) * weight[:, None]
    written_CV = tl.dot(inverse_CC, v_CV.to(MATH.dot), input_precision=MATH.precision) * tl.exp2(total - G)[:, None]
    for a in range(0, K, TK):
        k_CT = load_rows(k_rows.data, k_rows.t, C, a, C, K, TK).to(MATH.dot)
        own_TV = tl.dot(tl.trans(k_CT), written_CV.to(MATH.dot), input_precision=MATH.precision)
        store_block(states + row * (K * V), a, column, own_TV, K, V, TK, BV)


def chunk_state(x: Inputs, saved: Saved) -> Entries:
    """The chunks as entries of tier 0."""
    chunks, H, K = x.layout.chunks, x.heads, x.key_dim
    transitions, states = (x.empty(chunks, H, K, width, dtype=x.dtype) for width in (K, x.value_dim))
    totals = Totals(x.empty(chunks, H)) if x.decayed is None else Totals(None, x.decayed.totals)
    for v, out, kind in ((x.v, states, False), (x.k, transitions, True)):
        chunk_state_kernel[(chunks * H * x.tiling.tiles("chunk_state", kind),)](
            x.gifts,
            v,
            x.beta,
            saved,
            out,
            totals.heads,
            x.layout.table,
            *x.sizes,
            C=x.chunk_size,
            TRANSITION=kind,
            **x.constants("chunk_state", kind),
        )
    return Entries(transitions, totals, states)

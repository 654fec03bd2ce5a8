"""Each chunk's own state at its end, and its effect on a state that comes in.

    S_z = K^T diag(exp(Gam - G)) V          log P_z = Gam

G the cumulative log decay inside the chunk, Gam its last value. The keys of a diagonal gate have decayed to the end of
their chunk before: S_z = K^T V.
"""

# C chunk, G groups, H heads, K key, V value
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import SIZES, Sizes
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import Launch
from loglinear.kernels.triton.scalar_gate.states import Inputs, States
from loglinear.kernels.triton.tiles import LOG2_E, MIN_LOG_DECAY, head_program, load_rows, locate, rows_at, store_state


@launcher
@triton.jit(do_not_specialize=SIZES)
def chunk_state_kernel(
    k,
    v,
    log_decay,
    states,
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
    """One chunk, one head, one tile of V: the chunk's slot; also G, and Gam as the totals of the lowest tier.

    log_decay: None where the keys have decayed, and neither is written."""
    sizes = Sizes(T, N, H, R, L, cap)
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, c = head_program(TILES, sizes.H)
    chunk = locate(c.to(tl.int64), table, sizes, C)
    if chunk.n <= 0:
        return
    row = chunk.c * sizes.H + h
    if log_decay is not None:
        i = tl.arange(0, C)
        g = tl.load(rows_at(log_decay, chunk, h) + i * log_decay.t, mask=i < chunk.n, other=0.0).to(tl.float32)
        G = tl.cumsum(tl.maximum(g, MIN_LOG_DECAY) * LOG2_E, 0)
        total = tl.sum(tl.where(i == C - 1, G, 0.0), 0)
        if tile == 0:
            tl.store(states.cumulative + row * C + i, G)
            tl.store(states.totals + row, total)
    k_CK = load_rows(rows_at(k, chunk, h // sizes.R), k.t, chunk.n, 0, C, K, BK).to(MATH.dot)
    v_CV = load_rows(rows_at(v, chunk, h), v.t, chunk.n, tile * BV, C, V, BV)
    if log_decay is not None:
        v_CV = v_CV.to(tl.float32) * tl.exp2(total - G)[:, None]
    decayed_CV = v_CV.to(MATH.dot)
    state_KV = tl.dot(tl.trans(k_CK), decayed_CV, input_precision=MATH.precision)
    store_state(states.slots + row * (K * V), tile * BV, state_KV, K, V, BK, BV)


def chunk_state(x: Inputs, launch: Launch) -> States:
    """The Fenwick array with every chunk's own state in its slot, and the totals of the lowest tier."""
    y, H = x.layout, x.heads
    totals, cumulative = x.empty(len(y.runs) + 1, y.chunks, H), x.empty(y.chunks, H, x.chunk_size)
    return own_states(x, totals, cumulative, launch)


def own_states(x: Inputs, totals: Tensor, cumulative: Tensor | None, launch: Launch) -> States:
    """The same with these arrays; without `cumulative` the keys have decayed, and the totals are there."""
    y, H = x.layout, x.heads
    slots = x.empty(y.chunks, H, x.key_dim, x.value_dim, dtype=x.dtype)
    states = States(slots, x.initial, x.empty(*totals.shape[1:]), totals, cumulative)
    log_decay = None if cumulative is None else x.log_decay
    grid = y.chunks * H * x.value_tiles(launch)
    chunk_state_kernel[(grid,)](x.k, x.v, log_decay, states, y.table, *x.sizes, **x.constants(launch))
    return states

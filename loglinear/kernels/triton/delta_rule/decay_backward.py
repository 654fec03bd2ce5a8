"""The gradient of the log decays: the sum of all products that have the decay of token t in them.

G_i is a sum over the tokens up to i. A token decays what flows into it and into later ones, what earlier tokens have
given to the chunk's state, and exp(Gam) I of the transition:

    dg_t = sum_{i >= t} (rows' share of i - columns' share of i) + sum_{j < t} gift of j + exp(Gam) tr(dP)
"""

# C chunk, H heads, K key
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import Sizes, Slab
from loglinear.kernels.triton.delta_rule.states import SIZES, Inputs, InsideGradients, Lower
from loglinear.kernels.triton.delta_rule.tiles import head_rows, load_decays
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.tiles import MIN_LOG_DECAY, head_program, locate, slab_at


@launcher
@triton.jit(do_not_specialize=SIZES)
def decay_backward_kernel(
    log_decay,
    cumulative,
    dtransitions,
    dinside,
    dlog_state,
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
    PARTS: tl.constexpr,
    TK: tl.constexpr,
):
    """One chunk, one head: dlog_decay [B, T, H]."""
    sizes = Sizes(T, N, H, R, L, cap)
    _, h, c = head_program(1, sizes.H)
    chunk = locate(c.to(tl.int64), table, sizes, C)
    if chunk.n <= 0:
        return
    i, row = tl.arange(0, C), chunk.c * sizes.H + h
    inside = i < chunk.n
    _, total = load_decays(cumulative + row * C, C)
    trace = tl.zeros([], tl.float32)
    for t in range(0, K, TK):
        x = t + tl.arange(0, TK)
        diagonal = dtransitions + row * (K * K) + x * (K + 1)
        trace += tl.sum(tl.load(diagonal, mask=x < K, other=0.0).to(tl.float32), 0)
    dlog = tl.load(dinside.dlog_row + row * C + i, mask=inside, other=0.0)
    for plane in tl.static_range(2 * PARTS):  # of a part that has tokens, of those up to its last one
        is_read = inside & (chunk.n > plane % PARTS * (C // PARTS)) & (i < (plane % PARTS + 1) * (C // PARTS))
        dlog -= tl.load(dinside.dlog_column + (row * (2 * PARTS) + plane) * C + i, mask=is_read, other=0.0)
    gift = tl.load(dlog_state + row * C + i, mask=inside, other=0.0)
    dg = tl.cumsum(dlog, 0, reverse=True) + (tl.cumsum(gift, 0) - gift) + trace * tl.exp2(total)
    decays = head_rows(log_decay, chunk, h)
    g = tl.load(decays.data + i * decays.t, mask=inside, other=0.0).to(tl.float32)
    dg = tl.where(g < MIN_LOG_DECAY, 0.0, dg)
    out = slab_at(dlog_decay, chunk, sizes, h, 1) + i * dlog_decay.t
    tl.store(out, dg.to(dlog_decay.data.dtype.element_ty), mask=inside)


def decay_backward(
    x: Inputs, cumulative: Tensor, dtransitions: Tensor, dinside: InsideGradients, lower: Lower, dlog_decay: Slab
) -> None:
    """Write the gradient of the log decays."""
    decay_backward_kernel[(x.layout.chunks * x.heads,)](
        x.log_decay,
        cumulative,
        dtransitions,
        dinside,
        lower.dlog_state,
        dlog_decay,
        x.layout.table,
        *x.sizes,
        K=x.key_dim,
        C=x.chunk_size,
        PARTS=x.tiling.parts("scores_backward"),
        **x.tiling.options("decay_backward"),
    )

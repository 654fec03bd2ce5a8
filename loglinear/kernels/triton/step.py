"""The one-token steps as torch sees them: one operator that changes the state which it is given.

A step of a small batch takes as long as the CPU needs to launch it, and torch's dispatcher needs most of that time. So
a call that nothing records or transforms starts the kernel itself.
"""

# N rows, C chunk, M blocks, G groups, H heads, K key, V value, L levels
from __future__ import annotations

from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from loglinear.fenwick import log2
from loglinear.kernels.torch import is_traced
from loglinear.kernels.triton import delta_rule, scalar_gate
from loglinear.kernels.triton.args import DecodeState, Tokens
from loglinear.kernels.triton.launches import ceil_div, tile_width

# Measured on an H100 (docs/lab-notes/2026-11-26-decoding.md). With eight warps triton 3.6 compiles the delta rule's
# step wrongly: it makes an illegal access, where the interpreter, which checks every access, finds none.
PROGRAMS = 264  # tiles of V are halved until there are as many, two for each multiprocessor
LARGEST_TILE, SMALLEST_TILE = 64, 16
BLOCKS = 128  # columns of blocks whose loads are under way together
SCALAR_GATE: dict[str, Any] = dict(TK=64, num_warps=8, maxnreg=128)
DELTA_RULE: dict[str, Any] = dict(TK=64, num_warps=4)


def value_tile(programs: int, V: int) -> int:
    """Columns of V of one program, where each tile as wide as V can be needs so many programs."""
    tile = min(LARGEST_TILE, tile_width(V))
    while tile > SMALLEST_TILE and programs * ceil_div(V, tile) < PROGRAMS:
        tile //= 2
    return tile


STATE = ("position", "blocks", "k_buffer", "v_buffer", "decay_buffer", "beta_buffer", "inverse")
PLAIN = (Tensor, Parameter, NoneType)  # types without a dispatch of their own


def step(*arguments: Any) -> Tensor:
    """Return the outputs of `run`, by the operator if anything records or transforms the call."""
    tensors, state = arguments[:14], arguments[7:14]
    if is_traced() or not all(type(x) in PLAIN for x in tensors):
        return operator(*arguments)
    torch.autograd.graph.increment_version([x for x in state if x is not None])  # as the operator does
    return run(*arguments)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    level_scales: Tensor,
    active: Tensor | None,
    position: Tensor,
    blocks: Tensor,
    k_buffer: Tensor,
    v_buffer: Tensor,
    decay_buffer: Tensor,
    beta_buffer: Tensor | None,
    inverse: Tensor | None,
    scale: float,
    l2_normalize: bool,
) -> Tensor:
    """Outputs [N,H,V] of one token for each row that is active [N] (None: all are), 0 for others, and the state after
    it. q, k [N,G,K], v [N,H,V], log_decay, beta [N,H], level_scales [N,H,L]; the state's parts as in `FenwickState`.
    The delta rule with beta, else the scalar gate."""
    q, k, v, level_scales = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, level_scales))
    active = None if active is None else active.contiguous()  # a mask's column has a stride
    (N, H, V), (G, K), L = v.shape, k.shape[1:], level_scales.shape[2]
    C, M, BV = k_buffer.shape[1], blocks.shape[1], value_tile(N * H, V)
    out = torch.empty((N, H, V), dtype=v.dtype, device=v.device)
    state = DecodeState(position, blocks, k_buffer, v_buffer, decay_buffer, beta_buffer, inverse)
    inputs = [q, k, v, log_decay, *([] if beta is None else [beta]), level_scales]
    kernel, options = scalar_gate.step_kernel, dict(SCALAR_GATE)
    if beta is not None:
        kernel, options = delta_rule.step_kernel, dict(DELTA_RULE, UNIT=l2_normalize)
    options["TK"] = min(options["TK"], tile_width(K))
    kernel[(N * H * ceil_div(V, BV),)](
        *map(Tokens.of, inputs),
        active,
        state,
        out,
        H,
        H // G,
        L,
        scale,
        K=K,
        V=V,
        C=C,
        LOG_C=log2(C),
        M=M,
        BV=BV,
        UNROLL=BLOCKS // BV,
        num_stages=1,
        **options,
    )
    return out


operator = torch.library.custom_op("loglinear::step", run, mutates_args=STATE)


@operator.register_fake
def _(q, k, v, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(v, memory_format=torch.contiguous_format)

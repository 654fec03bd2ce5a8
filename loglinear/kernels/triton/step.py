"""The one-token steps as torch sees them: one operator that changes the state which it is given.

A step of a small batch takes as long as the CPU needs to launch it, and torch's dispatcher needs most of that time. So
a call that nothing records or transforms starts the kernel itself.
"""

# N rows, C chunk, M blocks, G groups, H heads, K key, V value, L levels
from __future__ import annotations

from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from loglinear.kernels.torch import is_traced
from loglinear.kernels.triton import delta_rule, scalar_gate
from loglinear.kernels.triton.args import DecodeState, Tokens
from loglinear.kernels.triton.launches import ceil_div, tile_width
from loglinear.kernels.triton.tree import StateTree
from loglinear.partition import Partition

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


class Operands(NamedTuple):
    """A token of every row that is active; None: all rows are."""

    q: Tensor  # [N, G, K]
    k: Tensor
    v: Tensor  # [N, H, V]
    log_decay: Tensor  # [N, H]
    beta: Tensor | None  # [N, H]: the delta rule's
    level_scales: Tensor  # [N, H, L]
    active: Tensor | None  # [N]


def step(
    x: Operands, state: DecodeState, scale: float, l2_normalize: bool, partition: Partition, sparse: bool = False
) -> Tensor:
    """Return the outputs of `operator`, through it only if something records or transforms the call."""
    tensors = (*x, *state)
    if is_traced() or not all(type(y) in PLAIN for y in tensors):
        return operator(*x, *state, scale, l2_normalize, partition.numbers, sparse)
    torch.autograd.graph.increment_version([y for y in state if y is not None])  # as the operator does
    return _run(x, state, scale, l2_normalize, partition, sparse)


@torch.library.custom_op("loglinear::step", mutates_args=STATE)
def operator(
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
    partition: list[int],
    sparse: bool,
) -> Tensor:
    """Outputs [N,H,V] of one token for each row that is active [N] (None: all are), 0 for others, and the state after
    it. q, k [N,G,K], v [N,H,V], log_decay, beta [N,H], level_scales [N,H,L]; the state's parts as in `FenwickState`.
    The delta rule with beta, else the scalar gate. `partition` holds the numbers of a `Partition`.
    sparse: blocks whose lambda is 0 are not read."""
    x = Operands(q, k, v, log_decay, beta, level_scales, active)
    state = DecodeState(position, blocks, k_buffer, v_buffer, decay_buffer, beta_buffer, inverse)
    return _run(x, state, scale, l2_normalize, Partition.of(partition), sparse)


@operator.register_fake
def _(q, k, v, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _run(
    x: Operands, state: DecodeState, scale: float, l2_normalize: bool, partition: Partition, sparse: bool
) -> Tensor:
    """Start the kernel of the token's family."""
    q, k, v, level_scales = (y if y.stride(-1) == 1 else y.contiguous() for y in (x.q, x.k, x.v, x.level_scales))
    active = None if x.active is None else x.active.contiguous()  # a mask's column has a stride
    (N, H, V), (G, K), L = v.shape, k.shape[1:], level_scales.shape[2]
    C, BV = state.k.shape[1], value_tile(N * H, V)
    out = torch.empty((N, H, V), dtype=v.dtype, device=v.device)
    inputs = [q, k, v, x.log_decay, *([] if x.beta is None else [x.beta]), level_scales]
    kernel, options = scalar_gate.step_kernel, dict(SCALAR_GATE)
    if x.beta is not None:
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
        TREE=StateTree.of(partition, C, state.blocks.shape[1]),
        BV=BV,
        UNROLL=BLOCKS // BV,
        SPARSE=sparse,
        num_stages=1,
        **options,
    )
    return out

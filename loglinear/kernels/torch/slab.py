"""An operator, forward and backward, one slab of heads after the other, or some at once (see `threads`).

Backward keeps the inputs alone and recomputes the chunk quantities and the states: that costs about a fifth of its
time, and saves the memory of the states and of every chunk matrix.
"""

# tokens: all sequences' tokens in one row; G groups, H heads, K key, V value, L levels, N sequences, M blocks
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loglinear.kernels.torch.chunks import from_chunks, level_mask, level_mask_backward, slab_heads, to_chunks
from loglinear.kernels.torch.schedule import Schedule
from loglinear.kernels.torch.threads import run

# q, k [tokens,G,K]; v [tokens,H,V]; log_decay [tokens,H]; beta [tokens,H] (delta rule only); level_scales [tokens,H,L];
# the states of the blocks before each sequence's first chunk [N,M,H,K,V], or None
Inputs = tuple[Any, ...]


class Slab(ABC):
    """Some heads' chunks and states. A family says how they are built, read and differentiated."""

    def __init__(self, inputs: Inputs, schedule: Schedule, heads: slice) -> None:
        q, k, v, log_decay, *rest, level_scales, initial = inputs
        R = v.shape[1] // q.shape[1]
        self.schedule, self.heads = schedule, heads
        self.shared = (R, R, *[1] * (len(inputs) - 3))  # how many heads share each input
        self.q, self.k = (to_chunks(x, heads, schedule, R) for x in (q, k))
        self.v, self.level_scales = (to_chunks(x, heads, schedule) for x in (v, level_scales))
        self.log_decay = to_chunks(log_decay, heads, schedule)
        # [H, N * M, K, V]
        self.initial = None if initial is None else initial[:, :, heads].flatten(0, 1).transpose(0, 1)
        self.build(*(to_chunks(x, heads, schedule) for x in rest))

    def mask(self) -> Tensor:
        """LAM [H, n, C, C], lambda inside the chunks."""
        return level_mask(self.level_scales, self.schedule.partition)

    def pull_mask(self, dscales: Tensor) -> Callable[[Tensor], None]:
        """A function that adds into dscales [H, n, C, L] what a gradient of LAM gives."""
        return lambda dmask: level_mask_backward(dmask, dscales, self.schedule.partition)

    @abstractmethod
    def build(self, *rest: Tensor) -> None:
        """The chunks' own states, then the Fenwick array."""

    @abstractmethod
    def output(self) -> Tensor:
        """[H, n, C, V]."""

    @abstractmethod
    def final_blocks(self, out: Tensor) -> None:
        """The states that a sequence leaves: the same walk with X = I. Writes out [N, M, H, K, V]."""

    @abstractmethod
    def backward(self, do: Tensor, dblocks: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """The gradients of the chunked inputs in their order, and of the initial blocks [H, N * M, K, V].

        dblocks: those of the final blocks, None where nobody read them."""

    def identity(self) -> Tensor:
        """The X of the final blocks' walk: one K x K identity per sequence."""
        K = self.q.shape[-1]
        eye = torch.eye(K, dtype=self.q.dtype, device=self.q.device)
        return eye.repeat(len(self.q), self.schedule.num_sequences, 1, 1)


def forward(family: type[Slab], schedule: Schedule, inputs: Inputs, final: bool) -> tuple[Tensor, Tensor]:
    """Outputs [tokens,H,V]; each sequence's block states at the start of its last chunk [N,M,H,K,V] where the schedule
    was made with `final`, else an empty tensor."""
    q, _, v, *_ = inputs
    out = v.new_zeros(v.shape)
    blocks = v.new_zeros(0)
    if final:
        blocks = v.new_zeros(schedule.num_sequences, schedule.num_blocks, v.shape[1], q.shape[2], v.shape[2])

    def compute(heads: slice) -> Tensor:
        slab = family(inputs, schedule, heads)
        output = slab.output()
        if final:
            slab.final_blocks(blocks[:, :, heads])
        return output

    def add(heads: slice, output: Tensor) -> None:
        from_chunks(output, out, heads, schedule)

    run(compute, add, *slab_heads(q, v, schedule))
    return out, blocks


def backward(
    family: type[Slab], schedule: Schedule, inputs: Inputs, dout: Tensor | None, dblocks: Tensor | None
) -> list[Tensor | None]:
    """The gradients of the inputs."""
    q, _, v, *_, initial = inputs
    do = torch.zeros_like(v) if dout is None else dout
    grads: list[Any] = [
        None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs
    ]

    def compute(heads: slice) -> tuple[tuple[int, ...], tuple[Tensor, ...], Tensor]:
        slab = family(inputs, schedule, heads)
        parts, dinitial = slab.backward(
            to_chunks(do, heads, schedule), None if dblocks is None else dblocks[:, :, heads]
        )
        return slab.shared, parts, dinitial

    def add(heads: slice, computed: tuple[tuple[int, ...], tuple[Tensor, ...], Tensor]) -> None:
        shared, parts, dinitial = computed
        for part, grad, R in zip(parts, grads, shared, strict=False):
            from_chunks(part, grad, heads, schedule, R)
        if initial is not None:
            grads[-1][:, :, heads] = dinitial.transpose(0, 1).unflatten(0, initial.shape[:2])

    run(compute, add, *slab_heads(q, v, schedule))
    return grads

"""An operator, forward and backward, one slab of heads after the other, or some at once (see `threads`).

Backward keeps the inputs alone and recomputes the chunk quantities and the states: that costs about a fifth of its
time, and saves the memory of the states and of every chunk matrix.
"""

# tokens: all sequences' tokens in one row; G groups, H heads, K key, V value, L levels, N sequences, M blocks
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from loglinear.kernels.torch.chunks import from_chunks, level_mask, level_mask_backward, slab_heads, to_chunks
from loglinear.kernels.torch.gate import gate_of
from loglinear.kernels.torch.schedule import Read, Schedule
from loglinear.kernels.torch.threads import run
from loglinear.kernels.torch.workspace import product, scaled, take

# q, k [tokens,G,K]; v [tokens,H,V]; log_decay [tokens,H] or [tokens,H,K]; beta [tokens,H] (delta rule only);
# level_scales [tokens,H,L]; the states of the blocks before each sequence's first chunk [N,M,H,K,V], or None
Inputs = tuple[Any, ...]

# each read, its y [H, m*w, rows of X, V], and the factor [H, m*w, 1] that y lacks, if it lacks one
Walk = Iterator[tuple[Read, Tensor, Tensor | None]]
Pull = Callable[..., Tensor]


class Slab(ABC):
    """Some heads' chunks and states. A family says how they are built, read and differentiated."""

    def __init__(self, inputs: Inputs, schedule: Schedule, heads: slice) -> None:
        q, k, v, log_decay, *rest, level_scales, initial = inputs
        R = v.shape[1] // q.shape[1]
        self.schedule, self.heads = schedule, heads
        self.shared = (R, R, *[1] * (len(inputs) - 3))  # how many heads share each input
        self.q, self.k = (to_chunks(x, heads, schedule, R) for x in (q, k))
        self.v, self.level_scales = (to_chunks(x, heads, schedule) for x in (v, level_scales))
        log_decay = to_chunks(log_decay, heads, schedule)
        self.gate, self.gate_shape = gate_of(log_decay), log_decay.shape
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
    def read_past(self) -> tuple[Tensor, Walk]:
        """O_in [H, n, C, V], and the walk of the queries: each read with its y [H, m*w, C, V], without lambda."""

    @abstractmethod
    def read_ends(self) -> Walk:
        """The walk of the states that a sequence leaves, X = I: each read with its y [H, m*w, K, V]."""

    def output(self) -> Tensor:
        """[H, n, C, V]."""
        out, walk = self.read_past()
        for read, y, decay in walk:
            out.index_add_(1, read.readers.flatten(), scaled(y, self.weight(read, decay)[..., None]))
        return out

    def final_blocks(self, out: Tensor) -> None:
        """Writes the states that a sequence leaves to out [N, M, H, K, V]."""
        for read, y, decay in self.read_ends():
            y = y if decay is None else scaled(y, decay[..., None])
            out[read.readers.flatten(), read.column] = y.transpose(0, 1)

    def weight(self, read: Read, decay: Tensor | None) -> Tensor:
        """lambda [H, m*w, C] of a read, times the factor that y lacks."""
        scales = take(self.level_scales[..., read.column], read.readers)
        return scales if decay is None else scaled(scales, decay)

    def pull_output(self, do: Tensor, dscales: Tensor) -> Pull:
        """A function from a read of a walk to dy, which adds into dscales [H, n, C, L]."""

        def pull(read: Read, y: Tensor, decay: Tensor | None = None) -> Tensor:
            readers = read.readers.flatten()
            dy = take(do, readers)
            dweight = product(dy, y).sum(-1)
            dscales[..., read.column].index_add_(1, readers, dweight if decay is None else dweight.mul_(decay))
            return dy.mul_(self.weight(read, decay)[..., None])

        return pull

    def pull_blocks(self, dblocks: Tensor) -> Pull:
        """A function from a final read to dy."""

        def pull(read: Read, y: Tensor, decay: Tensor | None = None) -> Tensor:
            dy = dblocks[read.readers.flatten(), read.column].transpose(0, 1)
            return dy if decay is None else dy * decay[..., None]

        return pull

    def of_tokens(self, dlog_decay: Tensor) -> Tensor:
        """The gradient [H, n, C, D] of the gate's log decays in the shape of its input."""
        return dlog_decay.reshape(self.gate_shape)

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

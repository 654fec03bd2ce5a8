"""One call of an operator, in the form that every implementation receives after `checked`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loglinear.kernels import MIN_LOG_DECAY
from loglinear.ops.state import FenwickState, checked_state, for_backward
from loglinear.ops.validation import (
    OPERANDS,
    Sizes,
    check_cu_seqlens,
    check_gate,
    check_log_decay,
    check_operands,
    check_partition,
    check_state_dtype,
    chunk_length,
    finite_number,
    flag,
    working_dtype,
)
from loglinear.partition import LARGEST_CHUNK, Partition


@dataclass(frozen=True)
class Problem:
    """The arguments of one call: shapes as in `loglinear.ops.api`, every tensor in its caller's dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    level_scales: Tensor
    scale: float
    initial_state: FenwickState | None
    output_final_state: bool
    cu_seqlens: Tensor | None
    chunk_size: int
    partition: Partition

    def checked(self, *, delta_rule: bool) -> Problem:
        """Return the same call with normalised arguments; chunk_size becomes the size of a block.

        Raises:
            ValueError: An argument does not fit; one line names it.
        """
        check_partition("partition", self.partition)
        chunk_size = chunk_length("chunk_size", self.chunk_size)
        sizes: Sizes = {"C": self.partition.chunk_near(chunk_size, LARGEST_CHUNK)}
        check_operands(self, OPERANDS[delta_rule], sizes)
        check_log_decay(self.log_decay)
        check_cu_seqlens(sizes["B"], sizes["T"], self.cu_seqlens)
        flag("output_final_state", self.output_final_state)
        scale, state = finite_number("scale", self.scale), self.initial_state
        if state is not None:
            sizes |= {"N": self.num_sequences, "M": self.partition.num_blocks(sizes["L"], sizes["C"])}
            state = checked_state(
                "initial_state", state, sizes, self.v.device, delta_rule=delta_rule, partition=self.partition
            )
            check_gate("initial_state", state, self.is_diagonal)
            check_state_dtype("initial_state", state, self.operands)
            state = for_backward(state, self.operands)
        if scale is self.scale and state is self.initial_state and sizes["C"] is self.chunk_size:
            return self
        return replace(self, scale=scale, initial_state=state, chunk_size=sizes["C"])

    @property
    def num_sequences(self) -> int:
        """The number of sequences, N: rows of the batch, or packed sequences."""
        return len(self.v) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """The tensors of the tokens; None where the call has none."""
        return self.q, self.k, self.v, self.log_decay, self.beta, self.level_scales

    @property
    def is_diagonal(self) -> bool:
        """True for a diagonal gate, with a decay for each channel of the keys."""
        if self.log_decay is None:
            return self.initial_state is not None and self.initial_state.is_diagonal
        return self.log_decay.dim() == 4

    @property
    def is_float64(self) -> bool:
        """True if any operand is float64."""
        return working_dtype(self.operands) == torch.float64

    def in_working_dtype(self) -> WorkingProblem:
        """Return the same call as the implementations in plain torch take it."""
        dtype = working_dtype(self.operands)
        if self.log_decay is None:
            channels = self.q.shape[3:] if self.is_diagonal else ()
            log_decay = self.v.new_zeros(*self.v.shape[:3], *channels, dtype=dtype)
        else:
            log_decay = self.log_decay.to(dtype).clamp(min=MIN_LOG_DECAY)
        return WorkingProblem(
            q=self.q.to(dtype) * self.scale if self.scale != 1.0 else self.q.to(dtype),
            k=self.k.to(dtype),
            v=self.v.to(dtype),
            log_decay=log_decay,
            beta=None if self.beta is None else self.beta.to(dtype),
            level_scales=self.level_scales.to(dtype),
            initial_state=self.initial_state,
            output_final_state=self.output_final_state,
            cu_seqlens=self.cu_seqlens,
            chunk_size=self.chunk_size,
            partition=self.partition,
        )


@dataclass(frozen=True)
class WorkingProblem:
    """A call with all tensors in float32 or float64, q multiplied by scale, and zeros for no decay."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor | None
    level_scales: Tensor
    initial_state: FenwickState | None
    output_final_state: bool
    cu_seqlens: Tensor | None
    chunk_size: int
    partition: Partition


def is_transformed() -> bool:
    """Return True inside forward-mode AD, torch.func.grad, torch.func.jvp or a transform made of them.

    A registered operator with an autograd formula is a constant to the first and an error to the others.
    """
    stack = torch._C._functorch.get_interpreter_stack() or []
    kinds = {interpreter.key() for interpreter in stack}
    vmap = torch._C._functorch.TransformType.Vmap
    return bool(kinds - {vmap}) or torch.autograd.forward_ad._current_level >= 0


# The result is constant within a graph, because the compiler guards each graph by the transforms around it. The
# decorator for this, torch.compiler.assume_constant_result, would import the whole compiler.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


UNIT_EPSILON = 1e-6  # of `unit_length`


def unit_length(x: Tensor) -> Tensor:
    """Return x / sqrt(|x|^2 + 1e-6) along the last dimension, computed in at least float32.

    The epsilon is that of flash-linear-attention.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + UNIT_EPSILON)).to(x.dtype)

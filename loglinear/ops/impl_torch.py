"""impl="torch": lay the state's tokens in front of the new ones, run the kernel, cut the new state off.

A state goes in front: the buffered tokens come first, the chunks start where the unfinished one started,
and the outputs of the buffered tokens are dropped. That is differentiable without a formula of its own.
"""

# N sequences, T time, C chunk, M blocks, H heads, G groups, K key, V value, L levels
from __future__ import annotations

import torch
from torch import Tensor

from loglinear.kernels import torch as kernels
from loglinear.ops.problem import Problem
from loglinear.ops.state import FenwickState


@torch._disable_dynamo  # its schedule is made on the host. torch.compiler.disable would import the whole compiler
def run(call: Problem) -> tuple[Tensor, FenwickState | None]:
    p = call.in_working_dtype()
    state, N = p.initial_state, len(p.lengths)
    positions = None if state is None else tuple(state.position.tolist())
    levels = p.level_scales.shape[3]
    schedule = kernels.schedule(p.lengths, positions, p.chunk_size, levels, p.output_final_state, p.v.device)
    held = 0 if state is None else N * p.chunk_size

    def tokens(new: Tensor, buffer: Tensor | None = None) -> Tensor:
        """New tokens behind the sequences' buffers; what has no buffer (q, lambda) is 0 there: nobody looks."""
        new = new.flatten(0, 1)
        if state is None:
            return new
        front = new.new_zeros(held, *new.shape[1:]) if buffer is None else buffer.flatten(0, 1).to(new.dtype)
        return torch.cat([front, new])

    k, v = tokens(p.k, state and state.k), tokens(p.v, state and state.v)
    log_decay = tokens(p.log_decay, state and state.log_decay)
    beta = None if p.beta is None else tokens(p.beta, state and state.beta)
    q, scales = tokens(p.q), tokens(p.level_scales)
    nodes = None if state is None else state.blocks.to(v.dtype)
    if beta is None:
        output, blocks = kernels.run_scalar_gate(q, k, v, log_decay, scales, nodes, schedule)
    else:
        output, blocks = kernels.run_delta_rule(q, k, v, log_decay, beta, scales, nodes, schedule)
    output = output[held:].view(p.v.shape)
    if not p.output_final_state:
        return output, None

    source, real = schedule.tail_rows, schedule.tail_real

    def tail(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        picked = x.index_select(0, source.flatten()).view(*source.shape, *x.shape[1:])
        return torch.where(real.view(*real.shape, *[1] * (x.dim() - 1)), picked, 0.0)

    lengths = torch.tensor(p.lengths, device=p.v.device)
    position = lengths if state is None else state.position + lengths
    k_tail, v_tail, decay_tail = tail(k), tail(v), tail(log_decay)
    assert k_tail is not None and v_tail is not None and decay_tail is not None
    return output, FenwickState(position, blocks, k_tail, v_tail, decay_tail, tail(beta))

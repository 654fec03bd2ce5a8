"""torch.compile for training: the blocks of a model, each in place, and on one GPU as CUDA graphs.

Of a small model's step on a GPU most is the host's: it launches some hundred kernels for each block. A CUDA graph is
recorded once and launched whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback

from loglinear.models import LogLinearForCausalLM

GRAPHS = 16  # that the compiler may make of the blocks' one function: a hybrid has twice the four below
SEQUENCES = 32  # in a row, or a multiple or power of two: each number of them is recorded by itself


def compile_blocks(model: LogLinearForCausalLM, *, cuda_graphs: bool = False, **options: Any) -> None:
    """Compile every block of the model when it first runs; `options` are torch.compile's.

    With `cuda_graphs` each becomes graphs whose results the next replays write over: where they are not needed any more
    `torch.compiler.cudagraph_mark_step_begin` has to say so, in training by GraphSteps.

    A step is then about 35 kernels a block besides the operator's own, forward and backward, instead of 200. Blocks of
    a kind share their graphs: for training and for evaluation one of any number of packed documents, and one of a
    single document. Names of parameters, checkpoints and what the model computes stay as they
    were. With impl="triton" a block is one graph; impl="torch" and softmax attention over packed documents run between
    graphs.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    if cuda_graphs:
        options["mode"] = "reduce-overhead"
    for block in model.model.layers:
        block.compile(**options)


def require_compiler(device: torch.device) -> None:
    """Raise ValueError where torch.compile cannot work on this device: without Triton on a GPU, g++ on a CPU."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # each part of the compiler has errors of its own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"compile needs a compiler that works for {device.type}, or leave it out: {reason}") from error


def in_few_sizes(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """The row with empty sequences behind its own, up to a power of two or a multiple of SEQUENCES: what it gives stays
    the same, to rounding."""
    cu_seqlens = row["cu_seqlens"]
    count = len(cu_seqlens) - 1
    wanted = 1 << (count - 1).bit_length() if count < SEQUENCES else -(-count // SEQUENCES) * SEQUENCES
    return {**row, "cu_seqlens": F.pad(cu_seqlens, (0, wanted - count), value=int(cu_seqlens[-1]))}


class GraphSteps(TrainerCallback):
    """Says where a row is done: until then what graphs gave must not be written over by their next replays."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The next row's gradients are to be added to those so far, which get memory of their own.

        Without it all rows of a step would be one sequence of graphs, recorded for every combination of their sizes.
        """
        for parameter in kwargs["model"].parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
        torch.compiler.cudagraph_mark_step_begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.compiler.cudagraph_mark_step_begin()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.compiler.cudagraph_mark_step_begin()

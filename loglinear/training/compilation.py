"""torch.compile for training: the blocks of a model, each in place."""

from __future__ import annotations

from typing import Any

import torch

from loglinear.models import LogLinearForCausalLM

GRAPHS = 16  # that the compiler may make of the blocks' one function: a hybrid has twice the four below


def compile_blocks(model: LogLinearForCausalLM, **options: Any) -> None:
    """Compile every block of the model when it first runs; `options` are torch.compile's.

    A step is then about 35 kernels a block besides the operator's own, forward and backward, instead of 200. Blocks of
    a kind share their graphs: for training and for evaluation one of any number of packed documents, and one of a
    single document. Names of parameters, checkpoints and what the model computes stay as they
    were. With impl="triton" a block is one graph; impl="torch" and softmax attention over packed documents run between
    graphs.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for block in model.model.layers:
        block.compile(**options)


def require_compiler(device: torch.device) -> None:
    """Raise ValueError where torch.compile cannot work on this device: without Triton on a GPU, g++ on a CPU."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # each part of the compiler has errors of its own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"compile needs a compiler that works for {device.type}, or leave it out: {reason}") from error

"""torch.compile for training: the blocks of a model, each in place."""

from __future__ import annotations

from typing import Any

import torch

from loglinear.models import LogLinearForCausalLM


def compile_blocks(model: LogLinearForCausalLM, **options: Any) -> None:
    """Compile every block of the model when it first runs; `options` are torch.compile's.

    Blocks of a kind share their graphs: one for the first row's number of packed documents, one for any number and one
    for a single document, each for training and for evaluation. Names of parameters and checkpoints stay as they were.
    With impl="triton" a block is one graph; impl="torch" and softmax attention over packed documents run between two.
    """
    for block in model.model.layers:
        block.compile(**options)


def require_compiler(device: torch.device) -> None:
    """Raise ValueError where torch.compile cannot work on this device: without Triton on a GPU, g++ on a CPU."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # each part of the compiler has errors of its own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"compile needs a compiler that works for {device.type}, or leave it out: {reason}") from error

"""torch.compile for training: every block of a model in place, and on one GPU as CUDA graphs.

A small model is launch-bound on a GPU: the CPU launches hundreds of kernels for each block. A CUDA graph is recorded
once and launched as a whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.config
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback

from loglinear.models import LogLinearForCausalLM

GRAPHS = 16  # limit for the blocks' one function: a hybrid needs twice the four that `compile_blocks` names
SEQUENCES = 32  # step of the number of sequences in a row: every number has a recording of its own


def compile_blocks(model: LogLinearForCausalLM, *, cuda_graphs: bool = False, **options: Any) -> None:
    """Compile every block of the model at its first run; `options` go to torch.compile.

    With `cuda_graphs` every block becomes CUDA graphs. Each replay overwrites the results of the last one, so the
    caller must call `torch.compiler.cudagraph_mark_step_begin` when they are no longer needed. In training GraphSteps
    does so.

    The compiler's deterministic mode is set for the whole process, so that a run can be repeated. Otherwise it measures
    several forms of a reduction at its first run and takes the fastest, which may be another one the next time.

    A step then takes about 35 kernels a block instead of 200, forward and backward, besides the operator's own. Blocks
    of one kind share their graphs: for training and for evaluation one for packed sequences and one for a single
    sequence. Parameter names, checkpoints and results stay the same. With impl="triton" a block is one graph;
    impl="torch" and softmax attention over packed sequences run between graphs.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    if hasattr(torch._inductor.config, "deterministic"):  # an older torch has no such mode
        torch._inductor.config.deterministic = True
    if cuda_graphs:
        options["mode"] = "reduce-overhead"
    for block in model.model.layers:
        block.compile(**options)


def require_compiler(device: torch.device) -> None:
    """Raise ValueError if torch.compile cannot work on this device: without Triton on a GPU, without g++ on a CPU."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # each part of the compiler has errors of its own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"compile needs a working compiler for {device.type}; use --no-compile: {reason}") from error


def in_few_sizes(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the row with empty sequences appended, up to a power of two or a multiple of SEQUENCES of them.

    The results stay the same to rounding.
    """
    cu_seqlens = row["cu_seqlens"]
    count = len(cu_seqlens) - 1
    wanted = 1 << (count - 1).bit_length() if count < SEQUENCES else -(-count // SEQUENCES) * SEQUENCES
    padded = {**row, "cu_seqlens": F.pad(cu_seqlens, (0, wanted - count), value=int(cu_seqlens[-1]))}
    if "initial_position" in row:
        padded["initial_position"] = F.pad(row["initial_position"], (0, wanted - count))
    return padded


class GraphSteps(TrainerCallback):
    """A callback that marks the end of every row, after which replays may overwrite the results of graphs."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy the gradients out of the graphs' memory, so that the next row's can be added to them.

        Without it the rows of a step would be one chain of graphs, recorded for every combination of their sizes.
        """
        for parameter in kwargs["model"].parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
        torch.compiler.cudagraph_mark_step_begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.compiler.cudagraph_mark_step_begin()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.compiler.cudagraph_mark_step_begin()

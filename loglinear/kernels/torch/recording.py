"""Operations may be recorded or transformed rather than run: their tensors hold no data, or belong to a transform."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

# The operators here read sizes on the host, and keep schedules. A replay of a CUDA graph writes over its memory.
RUNS_BETWEEN_GRAPHS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


def in_graph() -> bool:
    """True while operations are recorded in a graph rather than run."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_traced() -> bool:
    """True in a graph, a dispatch mode or a transform of torch.func.

    Python can read no value of a tensor made here, and none may be kept for later calls. A transform's tensors are dead
    wrappers once it ends: a later graph that takes one up ends the process.
    """
    return in_graph() or torch._C._len_torch_dispatch_stack() > 0 or bool(torch._C._functorch.get_interpreter_stack())


@contextmanager
def untraced() -> Iterator[None]:
    """Enter a context for tensors that outlast the modes and transforms in which they are made."""
    with _disable_current_modes(), temporarily_clear_interpreter_stack():
        yield

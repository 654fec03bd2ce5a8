"""The origin of a result: the command, the versions and the hardware."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import accelerate
import numpy
import torch
import transformers

import loglinear


def command() -> list[str]:
    """Return the command line of this process, without the folder of its program."""
    program = Path(sys.argv[0])
    is_ours = program.name in ("__main__.py", "loglinear")
    return ["loglinear" if is_ours else "/".join(program.parts[-2:]), *sys.argv[1:]]


def versions() -> dict[str, str]:
    """Return the versions and the hardware that a result depends on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if device != "cpu" and os.environ.get("CUDA_MPS_PIPE_DIRECTORY"):
        device += " shared with other processes (MPS)"  # so times are not those of the whole device
    return {
        "loglinear": loglinear.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "device": f"{device}, {torch.get_num_threads()} CPU threads",
    }

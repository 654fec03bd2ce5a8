"""`loglinear` in one of several processes; one of them kills itself in a step or while it saves, or stops in a step.

DIE holds its rank, the place ("step", "save" or "hang") and the step; DIED is a file for the time.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import torch
from transformers import Trainer

from loglinear.cli import main
from loglinear.training import lost


def die(*args: Any, **kwargs: Any) -> None:
    """Kill or stop this process."""
    Path(os.environ["DIED"]).write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGSTOP if place == "hang" else signal.SIGKILL)


def die_in_a_file(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
    """Kill this process when half of a file is written."""
    if hasattr(file, "write"):
        file.write(b"half of a file")
        file.flush()
    else:
        Path(file).write_bytes(b"half of a file")
    die()


def armed(name: str, before: int, target: Any, attribute: str, death: Any) -> Any:
    """Return a patch of a Trainer's method that is deadly after so many steps."""
    method = getattr(Trainer, name)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step != before:
            return method(self, *args, **kwargs)
        with mock.patch.object(target, attribute, death):
            return method(self, *args, **kwargs)

    return mock.patch.object(Trainer, name, call)


if __name__ == "__main__":
    lost.GRACE = float(os.environ.get("GRACE", lost.GRACE))
    rank, place, step = os.environ.get("DIE", "none none 0").split()
    if os.environ["RANK"] == rank and place == "save":
        armed("_save_checkpoint", int(step), torch, "save", die_in_a_file).start()
    elif os.environ["RANK"] == rank:  # after the forward pass, so that the others wait for gradients
        armed("training_step", int(step) - 1, accelerate.Accelerator, "backward", die).start()
    main(sys.argv[1:])

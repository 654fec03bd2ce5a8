"""`loglinear` in one of several processes; one of them kills itself in a step or while it saves, or stops in a step.

DIE holds its rank, the place ("step", "save" or "hang") and the number of the call there; DIED is a file for the time.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch

from loglinear.cli import main
from loglinear.training import lost


def dying(call: Callable[..., Any], moment: int, place: str) -> Callable[..., Any]:
    """Return a function that calls another one, and kills this process at the call with this number."""
    left = moment

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            if place == "save":
                Path(args[1]).write_bytes(b"half of a file")
            Path(os.environ["DIED"]).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGSTOP if place == "hang" else signal.SIGKILL)
        return call(*args, **kwargs)

    return counted


if __name__ == "__main__":
    lost.GRACE = float(os.environ.get("GRACE", lost.GRACE))
    rank, place, moment = os.environ.get("DIE", "none none 0").split()
    if os.environ["RANK"] == rank and place == "save":
        torch.save = dying(torch.save, int(moment), place)
    elif os.environ["RANK"] == rank:  # after the forward pass, so that the others wait for gradients
        accelerate.Accelerator.backward = dying(accelerate.Accelerator.backward, int(moment), place)
    main(sys.argv[1:])

"""`loglinear` in one of several processes; one of them kills itself in a step or while it saves.

DIE holds its rank, the place ("step" or "save") and the number of the call there; DIED is a file for the time.
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


def dying(call: Callable[..., Any], moment: int, *, is_save: bool) -> Callable[..., Any]:
    """Return a function that calls another one, and kills this process at the call with this number."""
    left = moment

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            if is_save:
                Path(args[1]).write_bytes(b"half of a file")
            Path(os.environ["DIED"]).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    return counted


if __name__ == "__main__":
    rank, place, moment = os.environ.get("DIE", "none none 0").split()
    if os.environ["RANK"] == rank and place == "step":  # after the forward pass, so that the others wait for gradients
        accelerate.Accelerator.backward = dying(accelerate.Accelerator.backward, int(moment), is_save=False)
    elif os.environ["RANK"] == rank:
        torch.save = dying(torch.save, int(moment), is_save=True)
    main(sys.argv[1:])

"""Train in processes that kill themselves at a random moment of saving, one after the other, until the run is done.

Imports once and forks: a kill costs a second. Arguments: the text, the run's folder, a seed and the largest number of
kills; prints how many there were.
"""

import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch

from loglinear.runs.checkpoints import checkpoints, defect
from loglinear.training.train import train
from tests.training.tiny import tiny_recipe

LAST = 60  # one save has about so many moments
PLACES = [(os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "chmod"), (torch, "save"), (shutil, "rmtree")]


def die_at(moment):
    """Kill this process before the call with this number, of all those that change what is on the disk."""
    left = moment

    def counted(call):
        def count(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return count

    for place, name in PLACES:
        setattr(place, name, counted(getattr(place, name)))


def attempt(data, out, moment):
    """Return True if the run, or its rest, came to its end in a process that dies at this moment."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if moment is not None:
                die_at(moment)
            train(tiny_recipe(data), out, resume=(out / "run.json").exists(), progress=False)
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status == 0


def main():
    data, out, rng = Path(sys.argv[1]), Path(sys.argv[2]), random.Random(int(sys.argv[3]))
    torch.set_num_threads(1)
    kills = 0
    while not attempt(data, out, rng.randint(1, LAST) if kills < int(sys.argv[4]) else None):
        kills += 1
        assert all(defect(path, resumable=True) is None for path in checkpoints(out))
    print(kills)


if __name__ == "__main__":
    main()

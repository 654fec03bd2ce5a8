"""The one-token kernels, compiled for compute capability 9.0 and started nowhere.

As a program it prints for each of `CASES` and both families the machine's instructions for a minimum or maximum, as
json. The interpreter must be off, so that tests start it as a process of its own.
"""

import importlib
import json
import re

import torch

from benchmarks.resources import compiled_only, dump
from loglinear.kernels.triton.args import DecodeState
from loglinear.partition import FENWICK, Partition

step = importlib.import_module("loglinear.kernels.triton.step")

# With the tokens of a chunk and the blocks of a state: the last one is one of several of its size.
CASES = {
    "radix 2": (FENWICK, 64, 11),
    "radix 4": (Partition(4), 64, 17),
    "largest block": (Partition(4, 16, 64), 16, 10),
}


def compiled(partition, C, M, delta, N=3, H=2, K=16, V=16):
    """The step's kernel for rows of one group."""
    x = step.Operands(
        q=torch.empty(N, 1, K),
        k=torch.empty(N, 1, K),
        v=torch.empty(N, H, V),
        log_decay=torch.empty(N, H),
        beta=torch.empty(N, H) if delta else None,
        level_scales=torch.empty(N, H, M + partition.first_column(C)),
        active=None,
    )
    state = DecodeState(
        position=torch.zeros(N, dtype=torch.int64),
        blocks=torch.empty(N, M, H, K, V),
        k=torch.empty(N, C, 1, K),
        v=torch.empty(N, C, H, V),
        decay=torch.empty(N, C, H),
        beta=torch.empty(N, C, H) if delta else None,
        inverse=torch.empty(N, C, H, C) if delta else None,
    )
    found = {}
    with compiled_only(found):
        step.step(x, state, 1.0, delta, partition)
    (kernel,) = found.values()
    return kernel


def minima(kernel):
    return re.findall(r"VIMNMX[^;]*", dump(kernel, "sass"))


def main():
    found = {name: [minima(compiled(*case, delta)) for delta in (False, True)] for name, case in CASES.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""The one-token kernels, compiled for compute capability 9.0 and started nowhere.

As a program it prints for each of `CASES`, for both families and for the scores, the machine's instructions for a
minimum or maximum, as json. The interpreter must be off, so that tests start it as a process of its own.
"""

import importlib
import json
import re

import torch

from benchmarks.resources import compiled_only, dump
from loglinear.kernels.triton.args import DecodeState
from loglinear.kernels.triton.bucket_scores import step as scores_step
from loglinear.partition import FENWICK, Partition

step = importlib.import_module("loglinear.kernels.triton.step")

# With the tokens of a chunk and the blocks of a state: the last one is one of several of its size.
CASES = {
    "radix 2": (FENWICK, 64, 11),
    "radix 4": (Partition(4), 64, 17),
    "largest block": (Partition(4, 16, 64), 16, 10),
}

SCORES = {
    "radix 2": (Partition(2, 64), 64, 11),
    "radix 4": (Partition(4, 64), 64, 17),
    "largest block": (Partition(4, 16, 64), 16, 10),
}


def compiled(partition, C, M, delta, N=3, H=2, K=16, V=16, sparse=False):
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
        step.step(x, state, 1.0, delta, partition, sparse)
    (kernel,) = found.values()
    return kernel


def compiled_scores(partition, C, M, N=3, G=2, K=128):
    """The kernel of the scores' step, whose chunks are finest blocks."""
    state = DecodeState(
        position=torch.zeros(N, dtype=torch.int64),
        blocks=torch.empty(N, M, G, K, K),
        k=torch.empty(N, C, G, K),
        v=torch.empty(N, C, G, K),
        decay=torch.empty(N, C, G),
        beta=None,
        inverse=None,
    )
    found = {}
    with compiled_only(found):
        scores_step(torch.empty(N, G, K), torch.empty(N, G, K), None, state, state.position, M + 1, partition)
    (kernel,) = found.values()
    return kernel


def minima(kernel):
    return re.findall(r"VIMNMX[^;]*", dump(kernel, "sass"))


def main():
    found = {
        name: [
            *(minima(compiled(*case, delta, sparse=sparse)) for delta in (False, True) for sparse in (False, True)),
            minima(compiled_scores(*SCORES[name])),
        ]
        for name, case in CASES.items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

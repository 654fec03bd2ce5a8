"""The kernels of the routed read's weights, compiled for compute capability 9.0 and started nowhere.

As a program it prints the registers and the bytes of stack of each of `CASES`, forward and backward, as json. The
interpreter must be off, so that tests start it as a process of its own.
"""

import json

import torch

from benchmarks.resources import compiled_only, resources
from loglinear.kernels.triton import routed_weights

CASES = {  # groups, heads of a group, columns
    "the paper's heads, radix 4": (1, 48, 13),
    "the paper's heads, radix 8": (1, 48, 18),
    "one group for each head": (24, 1, 13),
    "the most columns": (1, 2, 4096),
}


def compiled(G, R, L):
    """The registers and the stack of both kernels."""
    tokens = torch.ones(1, 300, L, dtype=torch.int64)
    logits, scores, tau = (torch.zeros(1, 300, G * R, L), torch.zeros(1, 300, G, L), torch.zeros(G * R))
    leaves = [logits.bfloat16().requires_grad_(), scores.requires_grad_(), tau.requires_grad_()]
    found = {}
    with compiled_only(found):
        routed_weights(leaves[0], leaves[1], tokens, leaves[2], 4.0).sum().backward()
    return {name.split()[0]: resources(kernel)[:2] for name, kernel in found.items()}


if __name__ == "__main__":
    print(json.dumps({name: compiled(*case) for name, case in CASES.items()}))

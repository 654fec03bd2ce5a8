"""Calls of `bucket_scores` for the tests of its kernels: results and every gradient, by name, beside float64.

TRITON_INTERPRET=1 python -m tests.kernels.scores          (ten minutes of one core; prints the tables below)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from loglinear.ops import FenwickState, bucket_scores, impl_triton
from loglinear.ops.problem import unit_length
from loglinear.ops.scores import zero_sums
from loglinear.partition import FENWICK, Partition
from tests.kernels.emulation import largest, leaf_state, teach_rounding
from tests.kernels.interpreter import teach_haste
from tests.ops.operators import gradients, random_loss, relative_error

# The largest errors over the calls of GRIDS. The blocks of EMULATED are those that few columns leave.
EMULATED = {
    torch.bfloat16: {
        "scores": 2.1e-3,
        "blocks": 7.15e-4,
        "gradient of q": 3.41e-3,
        "gradient of k": 3.41e-3,
    },
    torch.float16: {
        "scores": 7.23e-4,
        "gradient of q": 7.58e-4,
        "gradient of k": 1.07e-3,
    },
}
# Of heads of 5 numbers: their sums have few terms, over which the errors do not even out.
NARROW = {
    torch.bfloat16: {
        "scores": 3.32e-3,
        "gradient of q": 3.68e-3,
        "gradient of k": 4.17e-3,
    },
    torch.float16: {
        "scores": 7.84e-4,
        "gradient of q": 8.08e-4,
        "gradient of k": 1.18e-3,
    },
}
# Where no block has most of the tokens: a smaller part of each is its mean for random keys, which has no error.
SMALL_BLOCKS = {torch.bfloat16: {"blocks": 1.31e-3}}


class Grid(NamedTuple):
    """Calls of 1,111 tokens, two for each head and partition."""

    B: int
    heads: list[tuple[int, int]]  # groups and key dim
    columns: int
    partitions: list[Partition]
    final: bool = False

    @property
    def dtypes(self) -> list[torch.dtype]:
        """States of float16 are not measured."""
        return [torch.bfloat16] if self.final else [torch.bfloat16, torch.float16]


SMALL_BLOCK_PARTITIONS = [Partition(8, 32), Partition(16, 16)]
GRIDS = {
    "EMULATED": Grid(1, [(1, 128), (2, 64), (1, 80)], 12, [FENWICK, Partition(2, 64), Partition(16, 16)]),
    "EMULATED, states": Grid(2, [(2, 64)], 7, [Partition(4, 64), Partition(8, 32)], final=True),
    "NARROW": Grid(
        2,
        [(1, 5)],
        20,
        [FENWICK, Partition(2, 64), Partition(4, 16), Partition(4, 64), Partition(8, 64), Partition(16, 16)],
    ),
    "SMALL_BLOCKS": Grid(2, [(2, 64)], 40, SMALL_BLOCK_PARTITIONS, final=True),
}
PARTS = ("blocks", "k")  # v of a state is k, and it has no decay


def make(B, T, G, K, dtype, *, seed=0, device="cuda"):
    """Queries and keys of several lengths; a tenth of the queries are near a key."""
    generator = torch.Generator(device).manual_seed(seed)
    q, k = (torch.randn(B, T, G, K, generator=generator, device=device) for _ in range(2))
    near = torch.arange(0, T, 10, device=device)
    q[:, near] = k[:, near // 2] + 0.5 * q[:, near]
    factor = 10 ** (2 * torch.rand(2, B, T, G, 1, generator=generator, device=device) - 1)
    return {name: (x * f).to(dtype).requires_grad_() for name, x, f in zip("qk", (q, k), factor, strict=True)}


def results_of(inputs, impl, dtype, *, initial_state=None, weights=None, final=False, **options):
    """Scores, parts of the final state and every gradient by name; and the weights of the loss."""
    x = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs.items()}
    wide = torch.promote_types(dtype, torch.float32)
    state = leaf_state(initial_state, wide)
    out = bucket_scores(**x, impl=impl, initial_state=state, output_final_state=final, **options)
    found = {"scores": out.scores} | ({name: getattr(out.final_state, name) for name in PARTS} if final else {})
    weights = weights or random_loss(*found.values())
    leaves = x | ({} if state is None else {f"state's {name}": getattr(state, name) for name in PARTS})
    grads = gradients(list(found.values()), tuple(w.to(wide) for w in weights), list(leaves.values()))
    found |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: t.detach() for name, t in found.items()}, weights


def errors(
    inputs: dict[str, torch.Tensor],
    dtype: torch.dtype,
    *,
    before: Callable[[], None] = lambda: None,
    initial_state: FenwickState | None = None,
    **options,
) -> dict[str, float]:
    """The errors of impl="triton" against float64 from the same inputs. before: runs before the call."""
    exact, weights = results_of(inputs, "torch", torch.float64, initial_state=initial_state, **options)
    before()
    actual, _ = results_of(inputs, "triton", dtype, initial_state=initial_state, weights=weights, **options)
    return {name: relative_error(actual[name], e) for name, e in exact.items()}


def state_at(position, columns, partition, *, first=0, B=2, G=1, K=4, device="cuda"):
    """A state at `position` in float32, detached. Its first token is at `first`; at `position`: it has no token."""
    at = torch.full([B], first, device=device)
    sizes = dict(num_columns=columns, groups=G, key_dim=K, device=device)
    state = zero_sums(B, position=at, partition=partition, **sizes)
    if first == position:
        return state
    inputs = make(B, position - first, G, K, torch.float32, seed=7, device=device)
    options = dict(num_columns=columns, partition=partition, impl="torch", output_final_state=True)
    return bucket_scores(**inputs, initial_state=state, **options).final_state.detach()


def kernel_runs(partition, position, *, device, T=100, K=16):
    """Scores, blocks and gradients of the kernels, without the positions of first tokens and with zeros."""
    from loglinear.kernels.triton import bucket_scores as kernel

    C, columns = partition.finest_block, 9
    q, k = (unit_length(x.detach()).requires_grad_() for x in make(1, T, 1, K, torch.float32, device=device).values())
    blocks = state_at(position // C * C, columns, partition, B=1, K=K, device=device).blocks.requires_grad_()
    ends, starts = torch.tensor([0, T], device=device), torch.tensor([position // C], device=device)
    runs = []
    for first in (None, torch.zeros_like(starts)):
        found = kernel(q, k, blocks, ends, starts, first, columns, C, True, partition.numbers)
        loss = sum(x.sin().sum() for x in found)
        runs.append([*found, *torch.autograd.grad(loss, [q, k, blocks])])
    return runs


def emulate(grid: Grid, dtype: torch.dtype) -> dict[str, float]:
    """The largest errors of the grid's calls in the interpreter."""
    found = []
    for (G, K), partition, seed in itertools.product(grid.heads, grid.partitions, range(2)):
        torch.manual_seed(seed)
        inputs = make(grid.B, 1111, G, K, dtype, seed=seed, device="cpu")
        found.append(errors(inputs, dtype, num_columns=grid.columns, partition=partition, final=grid.final))
        print(dtype, G, K, partition, found[-1], flush=True)
    return largest(found)


if __name__ == "__main__":
    teach_rounding()
    teach_haste()
    impl_triton.unsupported = lambda problem: None  # bfloat16, now that the interpreter can multiply it
    for name, grid in GRIDS.items():
        for dtype in grid.dtypes:
            print(name, dtype, emulate(grid, dtype), flush=True)

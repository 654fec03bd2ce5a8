"""Sums of keys with arbitrary contents at chosen positions, and the errors of the scores of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from loglinear.ops import DecodeState, FenwickState, bucket_scores_step
from loglinear.ops.scores import zero_sums
from loglinear.partition import FENWICK, Partition
from tests.kernels.stepping import blocks_error, decoding


def full_sums(
    partition: Partition,
    positions: list[int],
    columns: int,
    device: str = "cpu",
    first: list[int] | None = None,
    **sizes,
) -> FenwickState:
    """A float64 state whose every number is random, those that are not of the past too; rows at these positions.

    first: the positions of the rows' first tokens; None: 0.
    """
    dims = dict(groups=1, key_dim=6) | sizes
    start = dict(position=torch.tensor(positions), partition=partition, dtype=torch.float64)
    state = zero_sums(len(positions), num_columns=columns, **start, **dims)
    state.blocks.normal_()
    state.k.copy_(torch.nn.functional.normalize(torch.randn_like(state.k), dim=-1))
    state.v.copy_(state.k)
    state.first.copy_(torch.tensor([0] * len(positions) if first is None else first))
    return state.with_tensors(x.to(device) for x in state.tensors)


def queries_and_keys(state: FenwickState, steps: int) -> list[tuple[Tensor, Tensor]]:
    """One float64 token for every row and step. Some have a length far from 1."""
    N, _, G, K = state.k.shape
    x = torch.randn(steps, 2, N, G, K, dtype=torch.float64, device=state.k.device)
    lengths = 10 ** (4 * torch.rand(steps, 2, N, G, 1, dtype=torch.float64, device=x.device) - 2)
    return [(q, k) for q, k in x * lengths]


def scores_error(found: Tensor, exact: Tensor, tokens: Tensor, K: int) -> float:
    """The largest error of a score, over 1 and what it is the difference of; infinite for a wrong 0."""
    if bool((found[exact == 0] != 0).any()):
        return float("inf")
    scale = 1 + exact.abs() + tokens.unsqueeze(-2) / K
    return float(((found.double() - exact).abs() / scale).nan_to_num(torch.inf).max())


def largest_error(state: FenwickState, tokens: list[tuple[Tensor, Tensor]], columns: int, **options) -> float:
    """Steps by impl="triton" in float32 and by impl="torch" in float64: the largest error of a score or a block."""
    exact, actual = decoding(state), decoding(state, torch.float32)
    return max(step_error(exact, actual, token, columns, **options) for token in tokens)


def step_error(
    exact: DecodeState, actual: DecodeState, token: tuple[Tensor, Tensor], columns: int, impl: str = "torch", **options
) -> float:
    """The largest error of one step of both states; the tokens of buckets are exact."""
    wide = [x.double() for x in token]
    expected, held = bucket_scores_step(*wide, exact, num_columns=columns, impl=impl, **options)
    narrow = [x.float() if x.dtype == torch.float64 else x for x in token]
    found, count = bucket_scores_step(*narrow, actual, num_columns=columns, impl="triton", **options)
    assert found.dtype == torch.float32
    assert torch.equal(count, held)
    active = options.get("active")
    rows = slice(None) if active is None else active
    error = scores_error(found[rows], expected[rows], held[rows], token[0].shape[2])
    return max(error, blocks_error(actual, exact))


def many_carries(partition: Partition) -> list[int]:
    """Positions before no carry, before carries of one, two and three digits, and inside of a chunk."""
    r, C = partition.radix, partition.finest_block
    chunks = [1, r, r**2, r**3, r**2 + r + 3, 3 * r]
    return [0, *(C * n - 1 for n in chunks), C * (r**3 - 1) + C // 2 + 1]


CASES = [
    (FENWICK, 12),
    (Partition(2, 16), 7),
    (Partition(4, 1), 14),
    (Partition(4, 4), 6),
    (Partition(4, 16), 40),
    (Partition(8, 2), 16),
    (Partition(16, 64), 19),
    (Partition(4, 128), 5),
    (Partition(128, 16), 9),
    (Partition(2, 1, 64), 16),
    (Partition(4, 16, 64), 21),
    (Partition(16, 16, 16), 70),
    (Partition(4, 4), 1),
    (Partition(4, 4), 2),
]

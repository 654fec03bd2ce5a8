"""The read of older states, in tiles, is its definition."""

import pytest
import torch

from loglinear.parallel import older
from loglinear.parallel.incoming import Incoming
from loglinear.parallel.pieces import Run

RUNS = (Run(5, (1, 2)), Run(1, (2, 2)), Run(7, (3, 3)))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tile", [1, 3, 100])
def test_reads_in_tiles_are_the_definition_with_every_gradient(monkeypatch, groups, tile):
    monkeypatch.setattr(older, "TILE", tile)
    torch.manual_seed(0)
    B, T, H, K, V, L = 2, 13, 4, 3, 5, 4
    shapes = [(B, T, H, V), (B, T, groups, K), (B, T, H), (B, T, H, L), (B, H, K, V), (B, H, K, V)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    local, x, decay, scales, *states = leaves
    actual = older.with_older(local, Incoming(x, decay, None), scales, states, RUNS)

    columns = torch.tensor([run.columns for run in RUNS for _ in range(run.length)])
    heads = x.repeat_interleave(H // groups, 2)
    expected = local
    for n, state in enumerate(states):
        weight = scales.gather(3, columns[None, :, None, n, None].expand(B, T, H, 1))[..., 0] * decay
        expected = expected + weight[..., None] * torch.einsum("bthk,bhkv->bthv", heads, state)
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(actual)
    for a, e in zip(*(torch.autograd.grad((y * weights).sum(), leaves) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(a, e)

"""Rows of a step: levels and blocks as `Partition` has them; tables are kept where they hold data."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from loglinear.kernels.torch import kept as kept_module
from loglinear.kernels.torch import step
from loglinear.partition import Partition

PARTITIONS = [Partition(), Partition(radix=4), Partition(radix=4, finest_block=4, largest_block=64)]


def kept():
    return len(kept_module._results)


@pytest.fixture(autouse=True)
def _nothing_kept():
    kept_module._results.clear()


def scales_of(position, C=16, L=7, M=3, partition=PARTITIONS[0]):
    scales = torch.arange(1.0, L + 1, device=position.device).expand(len(position), 2, L)
    return step.row_scales(scales, position, C, M, partition)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("largest_table", [1, 256])
@pytest.mark.parametrize("C, L", [(16, 4), (16, 9), (64, 12)])
def test_row_scales_are_those_of_the_partition(monkeypatch, partition, C, L, largest_table):
    monkeypatch.setattr(step, "LARGEST_TABLE", largest_table)
    M = partition.num_blocks(L, C)
    positions = [0, 1, C - 1, C, 5 * C + C // 2, 37 * C, (1 << 40) + 3, (1 << 62) - 1]
    for _ in range(2):  # the second time from what is kept
        seen, to_place, to_blocks = scales_of(torch.tensor(positions), C, L, M, partition)
        for n, position in enumerate(positions):
            place, chunks = position % C, position // C
            assert seen[n, 0].tolist() == [j <= place for j in range(C)]
            places = [min(partition.index(place, j), L - 1) + 1 if j <= place else 0 for j in range(C)]
            blocks = [partition.has_block(chunks, m, M, C) * (L - M + m + 1) for m in range(M)]
            assert to_place[n].tolist() == [places] * 2
            assert to_blocks[n].tolist() == [blocks] * 2


def test_a_step_makes_its_tables_once():
    with torch.inference_mode():
        scales_of(torch.zeros(1, dtype=torch.int64))
    made = kept()
    assert made == 2
    assert not any(table.is_inference() for tables in kept_module._results.values() for table in tables)
    scales_of(torch.tensor([5, 70]))
    assert kept() == made


def test_tables_without_data_are_not_kept():
    position = torch.tensor([21])
    with FakeTensorMode() as mode:
        scales_of(mode.from_tensor(position))
    torch.compile(scales_of, backend="eager", fullgraph=True)(position)
    torch.jit.trace(scales_of, position, check_trace=False)
    scales_of(torch.zeros(1, dtype=torch.int64, device="meta"))
    torch.func.vmap(lambda scale: scales_of(position)[1] * scale)(torch.ones(2))
    torch.func.grad(lambda scale: (scales_of(position)[1] * scale).sum())(torch.ones(()))
    assert kept() == 0


@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_captured_graph_reads_what_was_kept_before_and_keeps_nothing_of_its_own(monkeypatch, partition):
    M = partition.num_blocks(7, 16)
    blocks, state, full = torch.randn(1, M, 1, 2, 2), torch.randn(1, 1, 2, 2), torch.tensor([True])

    def merged():
        return step.merge_full(blocks, blocks, state, torch.tensor([4]), full, 16, partition)

    def made(*choices):
        raise AssertionError(f"made again: {choices}")

    is_captured = kept_module._is_captured
    monkeypatch.setattr(kept_module, "_is_captured", lambda device: True)
    expected = merged()
    assert kept() == 0
    monkeypatch.setattr(kept_module, "_is_captured", is_captured)
    assert torch.equal(merged(), expected) and kept() == 2
    monkeypatch.setattr(kept_module, "_is_captured", lambda device: True)
    monkeypatch.setattr(torch, "arange", made)
    assert torch.equal(merged(), expected)


def test_the_number_of_kept_results_has_a_bound(monkeypatch):
    monkeypatch.setattr(kept_module, "MOST", 3)
    for L in range(4, 14):
        expected = scales_of(torch.tensor([21]), L=L)
        assert kept() <= 3
        for actual, other in zip(scales_of(torch.tensor([21]), L=L), expected, strict=True):
            assert torch.equal(actual, other)


def test_rows_that_are_all_full_are_not_copied():
    assert step.rows_to_merge(torch.tensor([False, False])) is None
    assert step.rows_to_merge(torch.tensor([True, True])) == slice(None)
    assert step.rows_to_merge(torch.tensor([False, True])).tolist() == [1]


@pytest.mark.parametrize("N, M, most", [(1, 9, 1), (3, 7, 2), (2, 40, 13)])
def test_a_large_state_is_read_where_weights_are(monkeypatch, N, M, most):
    """Blocks without a weight hold NaN here: they are not read. The sum is that of the other blocks."""
    H, K, V = 4, 5, 3
    queries, blocks = (torch.randn(*shape, dtype=torch.float64) for shape in ((N, H, K), (N, M, H, K, V)))
    weights = torch.rand(N, H, M, dtype=torch.float64)
    chosen = weights.argsort(dim=-1)[..., : M - most]
    weights.scatter_(-1, chosen, 0.0)
    weights[0, 0] = 0.0  # a head that reads nothing
    expected = step.read_blocks(queries, blocks, weights)
    reads = [
        [sum(weights[n, h, m] * queries[n, h] @ blocks[n, m, h] for m in range(M)) for h in range(H)] for n in range(N)
    ]
    torch.testing.assert_close(expected, torch.stack([torch.stack(row) for row in reads]), rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(step, "SMALL_STATE", 0)
    torch.testing.assert_close(step.read_blocks(queries, blocks, weights), expected, rtol=1e-12, atol=1e-12)
    unread = (weights == 0).transpose(1, 2).clone()
    unread[0, :, 0] = False  # this head reads as many blocks as the others, with weights of 0
    holed = blocks.masked_fill(unread[..., None, None], torch.nan)
    torch.testing.assert_close(step.read_blocks(queries, holed, weights), expected, rtol=1e-12, atol=1e-12)


def test_a_state_whose_blocks_are_mostly_read_is_not_copied(monkeypatch):
    monkeypatch.setattr(step, "SMALL_STATE", 0)
    blocks, weights = torch.randn(2, 9, 4, 5, 3), torch.ones(2, 4, 9)
    assert step._most_read(blocks, weights.index_fill(2, torch.arange(3, 9), 0.0)) is None
    assert step._most_read(blocks, weights.index_fill(2, torch.arange(2, 9), 0.0)) == 2
    torch.compile(step.read_blocks, backend="eager", fullgraph=True)(torch.randn(2, 4, 5), blocks, 0 * weights)

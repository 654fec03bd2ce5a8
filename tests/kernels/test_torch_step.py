"""Rows of a step: levels and blocks as `Partition` has them; tables are kept where they hold data."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from loglinear.kernels.torch import step
from loglinear.partition import Partition

PARTITIONS = [Partition(), Partition(radix=4), Partition(radix=4, finest_block=4, largest_block=64)]


def kept():
    return step._place_tables.cache_info().currsize + step._kept_numbers.cache_info().currsize


@pytest.fixture(autouse=True)
def _nothing_kept():
    step._place_tables.cache_clear()
    step._kept_numbers.cache_clear()


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
    assert not any(table.is_inference() for table in step._place_tables(16, 7, PARTITIONS[0]))
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


def test_rows_that_are_all_full_are_not_copied():
    assert step.rows_to_merge(torch.tensor([False, False])) is None
    assert step.rows_to_merge(torch.tensor([True, True])) == slice(None)
    assert step.rows_to_merge(torch.tensor([False, True])).tolist() == [1]

"""The sets of states that an entry of the delta rule's tree reads, under the interpreter."""

import pytest
import torch

from loglinear.partition import Partition
from tests.kernels.interpreter import teach_interpreter

pytest.importorskip("triton")

import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.layout import tree_of
from loglinear.kernels.triton.delta_rule.reads import (
    columns_read,
    count_moves,
    count_reads,
    first_column,
    first_move,
    first_slot,
    is_column_read,
    is_slot_read,
    slots_read,
    step_of,
)
from loglinear.kernels.triton.walks import after

pytestmark = pytest.mark.interpreter
RADICES = [2, 4, 8, 16, 64]


@triton.jit
def columns_kernel(times, among, number, columns, initial, TREE: tl.constexpr):
    """Count how many times a run reads each column, and whether it is among those that are read."""
    reads = columns_read(number, columns, initial, TREE)
    for _ in range(count_reads(reads, TREE)):
        column = first_column(reads, columns, TREE)
        tl.store(times + column, tl.load(times + column) + 1)
        reads = after(reads, TREE)
    for column in range(columns):
        tl.store(among + column, is_column_read(number, column, columns, initial, TREE))


@triton.jit
def slots_kernel(times, among, moved_to, i, num_slots, TREE: tl.constexpr):
    """The same of the slots of an entry; and for each slot the one of the next entry that it comes into."""
    reads = slots_read(i, num_slots, TREE)
    for _ in range(count_reads(reads, TREE)):
        slot = first_slot(reads, TREE)
        tl.store(times + slot, tl.load(times + slot) + 1)
        reads = after(reads, TREE)
    for slot in range(num_slots):
        tl.store(among + slot, is_slot_read(i, slot, num_slots, TREE))
    target, merged, moved = step_of(i, num_slots, TREE)
    for _ in range(count_reads(merged, TREE)):
        tl.store(moved_to + first_slot(merged, TREE), target)
        merged = after(merged, TREE)
    for _ in range(count_moves(moved, num_slots, TREE)):
        members, target, moved = first_move(moved, num_slots, TREE)
        for _ in range(count_reads(members, TREE)):
            tl.store(moved_to + first_slot(members, TREE), target)
            members = after(members, TREE)


def blocks_of(partition, number, count):
    """For each of `count` blocks, does the past of `number` entries have it? The last one is all that is older."""
    return [int(partition.has_block(number, m, count, partition.finest_block)) for m in range(count)]


@pytest.mark.parametrize("radix", RADICES)
@pytest.mark.parametrize("has_prefix", [False, True])
def test_columns(radix, has_prefix, monkeypatch):
    """Each that the past has is read once, and with an initial state the last one."""
    teach_interpreter(monkeypatch.setattr)
    partition, generator = Partition(radix, 16), torch.Generator().manual_seed(radix)
    initial = torch.zeros(1) if has_prefix else None
    for columns in {1, 2, 3, radix - 1, radix, radix + 2, min(15, 2 * radix - 1)}:
        for number in (0, 1, radix, radix + 2, int(torch.randint(65536 // radix, (), generator=generator))):
            expected = blocks_of(partition, number, columns)
            expected[-1] |= has_prefix
            times, among = torch.zeros(2, 128, dtype=torch.int32)
            columns_kernel[(1,)](times, among, number, columns, initial, TREE=tree_of(partition, 16))
            assert times.tolist() == among.tolist() == expected + [0] * (128 - columns), (columns, number)


@pytest.mark.parametrize("radix", RADICES)
def test_slots(radix, monkeypatch):
    """Each that the past in the run has is read once, and comes into the slot where the next entry reads it."""
    teach_interpreter(monkeypatch.setattr)
    partition, tree = Partition(radix, 16), tree_of(Partition(radix, 16), 16)
    for slots in {1, 2, 3, tree.run_read} - {3 if radix == 2 else 0}:
        last = slots - 1
        for i in {0, 1, 2, 3, radix - 2, radix - 1}:
            expected = blocks_of(partition, i, slots)
            times, among, moved_to = torch.zeros(3, 64, dtype=torch.int32)
            moved_to -= 1
            slots_kernel[(1,)](times, among, moved_to, i, slots, TREE=tree)
            assert times.tolist() == among.tolist() == expected + [0] * (64 - slots), (slots, i)
            for slot in range(slots):
                if not expected[slot]:
                    assert moved_to[slot] == -1
                elif radix > 2 and i == radix - 1:
                    assert moved_to[slot] == 0  # the run is whole: one entry of the next tier
                else:
                    behind = [m for m in range(slot, slots) if blocks_of(partition, i + 1, slots)[m]]
                    assert moved_to[slot] == (behind[0] if radix == 2 else min(slot + 1, last)), (slots, i, slot)

"""The index tensors of the torch path say the same as `loglinear.partition` says one position at a time."""

import random

import pytest
import torch

from loglinear.kernels.torch import schedule, slab
from loglinear.kernels.torch.scalar_gate import ScalarGateSlab
from loglinear.partition import FENWICK, Partition

CPU = torch.device("cpu")


PARTITIONS = [FENWICK, Partition(2, 1, 8), Partition(4), Partition(4, 4, 64), Partition(8, 4, 4), Partition(16, 1, 16)]


def past(partition, C, num_blocks, z):
    """The blocks of chunk z's past, nearest first, as (number, first chunk, last chunk + 1); the last is the prefix."""
    blocks = []
    for end, size, column in partition.walk(z, C):
        number = column - partition.first_column(C)
        if number >= num_blocks - 1:
            return [*blocks, (num_blocks - 1, 0, end)]
        blocks.append((number, end - size, end))
    return blocks


def spans(built, positions, lengths):
    """For every slot of the array, the (sequence, first chunk, last chunk + 1) it covers after the merges."""
    C = built.chunk_size
    covers = {}
    row = 0
    for sequence, (position, length) in enumerate(zip(positions, lengths, strict=True)):
        for z in range(position // C, -(-(position + length) // C)):
            covers[row] = (sequence, z, z + 1)
            row += 1
    if built.initial_per_sequence:
        for sequence, position in enumerate(positions):
            for number, start, end in past(built.partition, C, built.num_blocks, position // C):
                covers[row + 1 + sequence * built.initial_per_sequence + number] = (sequence, start, end)
    for step in built.merges:
        for left, right in zip(step.left.tolist(), step.right.tolist(), strict=True):
            (a, start, middle), (b, same, end) = covers[left], covers[right]
            assert a == b and middle == same
            covers[right] = (a, start, end)
    return covers


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_reads_are_the_walk_of_the_partition(seed, partition):
    rng = random.Random(seed)
    C = partition.chunk_near(rng.choice([1, 4]), most=4)
    columns = rng.choice([1, 2, 4, 6, 10, 40])
    lengths = tuple(rng.choice([0, 1, 3, 17, 40]) for _ in range(rng.randint(1, 4))) + (5,)
    positions = tuple(rng.choice([0, 1, 7, 31, 100]) for _ in lengths) if seed % 2 else None
    built = schedule(lengths, positions, C, columns, True, CPU, partition)
    starts = positions or (0,) * len(lengths)
    covers = spans(built, starts, lengths)
    if built.scan is not None:
        ends = [(covers[entry][0], 0, covers[entry][2]) for entry in built.scan.entries.tolist()]
        covers |= dict(zip(built.scan.prefixes.tolist(), ends, strict=True))
    assert max(covers, default=0) < built.num_rows

    def collect(reads, readers, filler=None):
        seen = {reader: [] for reader in range(readers)}
        for read in reads:
            for source, row in zip(read.sources.tolist(), read.readers.tolist(), strict=True):
                for reader in row:
                    if reader != filler:
                        seen[reader].append((read.column, covers[source]))
        return seen

    def expected(sequence, z):
        return [(number, (sequence, first, end)) for number, first, end in past(partition, C, built.num_blocks, z)]

    met = collect(built.reads, built.num_chunks, built.num_chunks)
    assert met == collect([read for turn in built.turns for read in turn], built.num_chunks, built.num_chunks)
    row = 0
    for sequence, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        for z in range(start // C, -(-(start + length) // C)):
            wanted = [(partition.block_column(number, columns, C), span) for number, span in expected(sequence, z)]
            assert met[row] == wanted
            row += 1
    ends = collect(built.final_reads, len(lengths))
    for sequence, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        assert ends[sequence] == expected(sequence, (start + length) // C)


def test_what_a_turn_reads_does_not_grow_with_the_levels():
    """The backward keeps one copy of the queries for every read of a turn: the sum must stay a multiple of T."""
    for partition in (FENWICK, Partition(4), Partition(16, 4), Partition(8, 4, 32)):
        for chunks in (16, 64, 256, 1024) if partition.largest_block is None else (16, 64, 256):
            built = schedule((4 * chunks,), None, 4, 400, False, CPU, partition)
            kept = [sum(read.readers.numel() for read in turn) for turn in built.turns]
            assert max(kept) <= 5 * chunks
            met = sum(len(partition.walk(z, 4)) for z in range(chunks))
            assert met <= sum(kept) <= 2 * met


def test_the_number_of_operations_grows_with_the_levels_not_the_tokens():
    """No loop over tokens or chunks: four times the length adds two levels' operations."""

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    def operations(T):
        q, v = torch.randn(T, 1, 2), torch.randn(T, 1, 2)
        inputs = (q, q, v, torch.zeros(T, 1), torch.ones(T, 1, 40), None)
        built = schedule((T,), None, 4, 40, False, CPU)
        with torch.no_grad(), Counter() as counter:
            slab.forward(ScalarGateSlab, built, inputs, False)
            slab.backward(ScalarGateSlab, built, inputs, v, None)
        return counter.count

    small, middle, large = operations(256), operations(1024), operations(4096)
    assert middle - small == large - middle > 0

"""The index tensors of the torch path say the same as `loglinear.fenwick` says one position at a time."""

import random

import pytest
import torch

from loglinear.fenwick import block_cap, block_level, walk
from loglinear.kernels.torch import schedule, slab
from loglinear.kernels.torch.scalar_gate import ScalarGateSlab

CPU = torch.device("cpu")


def spans(built, cap, positions, lengths):
    """For every slot of the array, the (sequence, first chunk, last chunk + 1) it covers after the merges."""
    C = built.chunk_size
    covers = {}
    row = 0
    for sequence, (position, length) in enumerate(zip(positions, lengths, strict=True)):
        for z in range(position // C, -(-(position + length) // C)):
            covers[row] = (sequence, z, z + 1)
            row += 1
    if built.nodes_per_sequence:
        for sequence, position in enumerate(positions):
            z0 = position // C
            for m in range(built.nodes_per_sequence):
                end = z0 >> m << m
                start = 0 if m == cap else end - (1 << m)
                covers[row + 1 + sequence * built.nodes_per_sequence + m] = (sequence, start, end)
    for step in built.merges:
        for left, right in zip(step.left.tolist(), step.right.tolist(), strict=True):
            (a, start, middle), (b, same, end) = covers[left], covers[right]
            assert a == b and middle == same
            covers[right] = (a, start, end)
    return covers


@pytest.mark.parametrize("seed", range(12))
def test_reads_are_the_fenwick_walk(seed):
    rng = random.Random(seed)
    C, levels = rng.choice([1, 4]), rng.choice([1, 4, 6, 30])
    lengths = tuple(rng.choice([0, 1, 3, 17, 40]) for _ in range(rng.randint(1, 4))) + (5,)
    positions = tuple(rng.choice([0, 1, 7, 31, 100]) for _ in lengths) if seed % 2 else None
    cap = block_cap(levels, C)
    built = schedule(lengths, positions, C, levels, True, CPU)
    starts = positions or (0,) * len(lengths)
    covers = spans(built, cap, starts, lengths)
    if built.scan is not None:  # the scan makes prefixes of the blocks of the cap's size
        for entry in built.scan.entries.tolist():
            sequence, _, end = covers[entry]
            covers[entry] = (sequence, 0, end)

    def collect(reads, readers):
        seen = {reader: [] for reader in range(readers)}
        for read in reads:
            for source, row in zip(read.sources.tolist(), read.readers.tolist(), strict=True):
                for reader in row:
                    if reader != built.num_chunks:
                        seen[reader].append((read.level, covers[source]))
        return seen

    def expected(sequence, z):
        blocks = []
        for end, size in walk(z):
            if size >= cap:
                return blocks + [(cap, (sequence, 0, end))]
            blocks.append((size, (sequence, end - (1 << size), end)))
        return blocks

    met = collect(built.reads, built.num_chunks)
    assert met == collect([read for turn in built.turns for read in turn], built.num_chunks)
    row = 0
    for sequence, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        for z in range(start // C, -(-(start + length) // C)):
            wanted = [(block_level(size, levels, C), span) for size, span in expected(sequence, z)]
            assert met[row] == wanted
            row += 1
    ends = collect(built.final_reads, len(lengths))
    for sequence, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        assert ends[sequence] == expected(sequence, (start + length) // C)


def test_what_a_turn_reads_does_not_grow_with_the_levels():
    """The backward keeps one copy of the queries for every read of a turn: the sum must stay a multiple of T."""
    for chunks in (16, 256, 4096):
        built = schedule((4 * chunks,), None, 4, 40, False, CPU)
        kept = [sum(read.readers.numel() for read in turn) for turn in built.turns]
        assert max(kept) <= 4 * chunks
        assert sum(kept) >= chunks * (len(built.reads) // 2)


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

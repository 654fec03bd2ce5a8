"""The radix-r partition says the same one position, one chunk and one step at a time; radix 2 is the Fenwick tree."""

import re

import numpy
import pytest

from loglinear import fenwick
from loglinear.partition import FENWICK, Partition

PARTITIONS = [
    Partition(radix, finest, None if growth is None else finest * radix**growth)
    for radix in (2, 4, 8, 16)
    for finest in (1, 4, 16)
    for growth in (None, 0, 1)
]

every_partition = pytest.mark.parametrize("partition", PARTITIONS, ids=str)


def test_radix_2_is_the_fenwick_tree():
    assert all(FENWICK.index(t, s) == fenwick.level(t, s) for t in range(130) for s in range(t + 1))
    assert all(FENWICK.num_columns(length) == fenwick.num_levels(length) for length in range(1, 300))
    for z in range(200):
        blocks = FENWICK.walk(z, chunk_size=16)
        assert [(block.end, fenwick.log2(block.size)) for block in blocks] == fenwick.walk(z)
        for columns in (3, 8, 20):
            clamped = [min(block.column, columns - 1) for block in blocks]
            assert clamped == [min(5 + size, columns - 1) for _, size in fenwick.walk(z)]


@every_partition
def test_buckets_are_whole_blocks_that_grow_with_age(partition):
    """Every bucket but column 0 is one aligned block, older ones are as large or larger, and sizes are as stated."""
    f, r, largest = partition.finest_block, partition.radix, partition.largest_block
    for t in (0, 1, 2, 16, 17, 63, 64, 65, 130, 256, 257):
        columns = [partition.index(t, s) for s in range(t + 1)]
        assert columns == sorted(columns, reverse=True)
        assert len(columns) - columns.index(0) == t % f + 1
        sizes = [columns.count(column) for column in sorted(set(columns))[1:]]
        assert sizes == sorted(sizes)
        assert max(sizes, default=f) <= (largest or 10**9)
        for column in set(columns) - {0}:
            size = columns.count(column)
            assert size in [f * r**p for p in range(10)] and columns.index(column) % size == 0
        assert partition.num_columns(t + 1) == columns[0] + 1


@every_partition
def test_a_bucket_holds_the_positions_of_its_column(partition):
    for t in (0, 1, 3, 4, 15, 16, 63, 64, 65, 257):
        for L in (1, 2, 5, partition.num_columns(t + 1), 90):
            held = [[s for s in range(t + 1) if min(partition.index(t, s), L - 1) == column] for column in range(L)]
            assert [list(bucket) for bucket in partition.buckets(t, L)] == held


def test_buckets_of_no_position_are_refused():
    for arguments, text in (
        ((-1, 3), "t must be at least 0, got -1"),
        ((3, 0), "num_columns must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            FENWICK.buckets(*arguments)


@every_partition
def test_the_walk_of_a_chunk_has_the_columns_of_its_tokens(partition):
    f, r = partition.finest_block, partition.radix
    for C in {f, partition.chunk_near(f * r, most=4096)}:
        for z in range(300 // C + 1):
            end = z
            for block in partition.walk(z, C):
                assert block.end == end
                end -= block.size
                tokens = range(end * C, block.end * C)
                assert {partition.index(t, s) for t in (z * C, z * C + C - 1) for s in tokens} == {block.column}
                assert block.end % block.size == 0
            assert end == 0


@every_partition
@pytest.mark.parametrize("columns", [1, 2, 5, 100])
def test_one_step_moves_columns_as_the_index_does(partition, columns):
    for t in range(1, 131):
        moves = partition.next_columns(t, columns)
        for s in range(t):
            before, after = (min(partition.index(now, s), columns - 1) for now in (t - 1, t))
            assert moves[before] == after


@every_partition
def test_a_chunk_is_a_block(partition):
    C = partition.chunk_near(64, most=4096)
    partition.check_chunk_size(C)
    assert partition.finest_block <= C and (partition.largest_block or C) >= C
    for wrong in (0, 48, C // 2 if partition.finest_block == C else 3):
        with pytest.raises(ValueError, match=re.escape(f"chunk_size must be the size of a block of {partition}, got")):
            partition.check_chunk_size(wrong)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (dict(radix=1), "radix must be a power of two of at least 2, got 1"),
        (dict(radix=6), "radix must be a power of two of at least 2, got 6"),
        (dict(radix=4.0), "radix must be a power of two of at least 2, got 4.0"),
        (dict(radix=True), "radix must be a power of two of at least 2, got True"),
        (dict(finest_block=0), "finest_block must be a power of two of at least 1, got 0"),
        (dict(finest_block=12), "finest_block must be a power of two of at least 1, got 12"),
        (dict(radix=4, largest_block=32), "largest_block must be finest_block = 1 times a power of radix = 4, got 32"),
        (
            dict(radix=4, finest_block=16, largest_block=4),
            "largest_block must be finest_block = 16 times a power of radix = 4, got 4",
        ),
        (dict(largest_block=-4), "largest_block must be a power of two of at least 1, got -4"),
    ],
    ids=str,
)
def test_numbers_that_no_partition_has(arguments, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        Partition(**arguments)


def test_numbers_of_numpy_make_the_same_partition():
    assert Partition(numpy.int64(4), numpy.uint8(16)) == Partition(4, 16)
    assert hash(Partition(numpy.int64(4))) == hash(Partition(4)) and type(Partition(numpy.int64(4)).radix) is int


def test_the_blocks_of_a_state():
    """A state has the blocks of its chunk's past, and the last one is everything older."""
    for partition in PARTITIONS:
        C = partition.chunk_near(4, most=64)
        for columns in (1, 2, 5, 9, 40):
            M = partition.num_blocks(columns, C)
            for z in range(70):
                walked = {min(b.column, columns - 1) for b in partition.walk(z, C)}
                held = {partition.block_column(m, columns, C) for m in range(M) if partition.has_block(z, m, M, C)}
                assert held == walked


def test_a_length_without_tokens_has_no_columns():
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        FENWICK.num_columns(0)

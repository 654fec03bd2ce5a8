"""The partition of a candidate as tensors, for the longest sequence. Shorter sequences use a corner of them."""

# I units that read and J units that are read (tokens of a chunk, or chunks), N buckets
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from experiments.reads.read import Read
from loglinear.partition import Partition

CHUNK = 16  # tokens; smaller buckets are a matrix inside the chunk, larger ones sums of chunks


class Buckets(NamedTuple):
    """The buckets through which each unit reads each older unit. Bucket 0 is the reader's own unit.

    Units are the tokens of a chunk, or the chunks of a sequence.
    """

    member: Tensor  # [I, J, N] 1 if unit I reads unit J through bucket N
    tokens: Tensor  # [I, N] the tokens of a whole bucket, at least 1
    live: Tensor  # [I, N] bool: the bucket holds something
    end: Tensor  # [I, J] the last unit of the bucket of J

    def first(self, units: int) -> Buckets:
        """Return the buckets of a sequence of that many units."""
        return Buckets(self.member[:units, :units], self.tokens[:units], self.live[:units], self.end[:units, :units])


def inside(read: Read) -> Buckets | None:
    """Return the buckets of a chunk's tokens, or None if a chunk is one block."""
    if read.finest >= CHUNK:
        return None
    read.partition.check_chunk_size(CHUNK)
    return _buckets(read.partition, CHUNK, 1)


def between(read: Read, length: int) -> Buckets:
    """Return the buckets of chunks, for sequences of at most `length` tokens.

    The reader's own block, which may have several chunks, is bucket 0.
    """
    return _buckets(Partition(read.radix, max(read.finest, CHUNK)), -(-length // CHUNK), CHUNK)


def _buckets(partition: Partition, units: int, tokens: int) -> Buckets:
    """Return the buckets of `units` units of `tokens` tokens each."""
    member = torch.zeros(units, units, partition.num_columns(units * tokens))
    end = torch.zeros(units, units, dtype=torch.long)
    for i in range(units):
        last: dict[int, int] = {}
        for j in range(i, -1, -1):
            bucket = partition.index(i * tokens, j * tokens)
            member[i, j, bucket] = 1
            end[i, j] = last.setdefault(bucket, j)
    count = member.sum(1)
    return Buckets(member, (count * tokens).clamp(min=1), count > 0, end)

"""The partition of a candidate as tensors, for the longest sequence; shorter ones use a corner of them."""

# Z query blocks, C key blocks, N buckets, f tokens of a finest block
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from experiments.reads.read import Read


class Partition(NamedTuple):
    """Which bucket each block reads each older block through."""

    member: Tensor  # [Z, C, N] 1 if a token of block z reads block c through bucket n
    tokens: Tensor  # [Z, N] the tokens of a bucket as a token of block z sees it; at least 1
    live: Tensor  # [Z, N] bool: the bucket holds something
    end: Tensor  # [Z, C] the last block of the bucket of c

    @classmethod
    def of(cls, read: Read, length: int) -> Partition:
        """Return the partition for sequences of at most `length` tokens."""
        blocks = -(-length // read.finest)
        member = torch.zeros(blocks, blocks, read.num_buckets(length))
        end = torch.zeros(blocks, blocks, dtype=torch.long)
        for z in range(blocks):
            last: dict[int, int] = {}
            for c in range(z, -1, -1):
                bucket = read.bucket(z, c)
                member[z, c, bucket] = 1
                end[z, c] = last.setdefault(bucket, c)
        count = member.sum(1)
        return cls(member, (count * read.finest).clamp(min=1), count > 0, end)

    def first(self, blocks: int) -> Partition:
        """Return the partition of a sequence of that many blocks."""
        return Partition(
            self.member[:blocks, :blocks], self.tokens[:blocks], self.live[:blocks], self.end[:blocks, :blocks]
        )

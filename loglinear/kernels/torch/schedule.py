"""Who merges with whom and who reads what: the Fenwick tree of a batch, as index tensors.

All sequences' chunks lie in one array, ``num_chunks`` of them, followed by one empty chunk that fills short rows.
A sequence may begin in the middle of its history: chunk ``i`` of the array is chunk ``z[i]`` of its sequence, and the
states of the blocks before its first chunk z0 come from outside. They are extra rows behind the array, ``initial``:
initial block ``m`` of a sequence is its block in the ``m``-th column of chunks, the last one its whole older prefix.
Prefixes have rows of their own where the blocks at whose ends they end are read apart too. So the rows of the slot
array are [chunks, empty chunk, initial blocks of sequence 0, of sequence 1, ..., prefixes].

Everything here is integer arithmetic on ``z``; see `loglinear.partition` for the same rules one position at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from loglinear.kernels.torch.recording import untraced
from loglinear.partition import FENWICK, Height, Partition

# A backward that keeps what every read met would need memory for log2(T / C) copies of the queries. So the chunks take
# turns, one turn for every so many reads: the number of turns grows like the levels, and the memory like T.
READS_A_TURN = 4


@dataclass(frozen=True)
class Merge:
    """slot[right] <- transition[right] slot[left] + slot[right], for all pairs at once."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Read:
    """Each row of `readers` reads the slot in the same row of `sources`, weighted by the lambda of `column`."""

    column: int
    sources: Tensor  # [m] rows of the slot array, all different
    readers: Tensor  # [m, w] chunks (final blocks: sequences); short rows are filled with the empty chunk


@dataclass(frozen=True)
class Scan:
    """Makes prefixes of the slots `entries` (blocks of the largest size, in order), in log2 many merges."""

    entries: Tensor  # [n] rows of the slot array
    prefixes: Tensor  # [n] rows of the slot array; the entries themselves if no read needs the blocks apart
    ups: list[Merge]  # positions in `entries`; they also compose the transitions
    downs: list[Merge]
    mirrored_ups: list[Merge]  # the same scan from right to left, for the backward
    mirrored_downs: list[Merge]
    successor: Tensor  # positions whose prefix continues the one before them


@dataclass(frozen=True)
class Schedule:
    partition: Partition
    chunk_size: int
    num_chunks: int
    num_sequences: int
    num_blocks: int  # block states per sequence, the prefix included
    initial_per_sequence: int  # 0 without an initial state
    num_prefixes: int  # prefixes with rows of their own
    rows: Tensor  # [(num_chunks + 1) * C] the source token of each place; any token where `padding` lists it
    padding: Tensor  # places without a token
    places: Tensor  # [source tokens] the place of each source token; an empty chunk's for those left out
    merges: list[Merge]
    scan: Scan | None
    reads: list[Read]  # nearest blocks first; the last one may read prefixes
    turns: list[list[Read]]  # the same reads, a part of the chunks after the other; see READS_A_TURN
    final_reads: list[Read]  # the same walk from each sequence's end; `column` is the block's number

    @property
    def initial(self) -> slice:
        """The rows of the slot array that come from outside."""
        first = self.num_chunks + 1
        return slice(first, first + self.num_sequences * self.initial_per_sequence)

    @property
    def num_rows(self) -> int:
        return self.initial.stop + self.num_prefixes


@lru_cache(maxsize=64)
@untraced()
@torch.inference_mode(False)  # a cached tensor made in inference mode could never be saved for a backward
def schedule(
    lengths: tuple[int, ...],
    positions: tuple[int, ...] | None,
    chunk_size: int,
    num_columns: int,
    final: bool,
    device: torch.device,
    partition: Partition = FENWICK,
) -> Schedule:
    """The schedule of sequences of `lengths` new tokens that continue at `positions` (None: at 0, without a state).

    Source tokens are numbered [buffers of sequence 0, 1, ... (C each, only with positions), new tokens].
    """
    C, M, N = chunk_size, partition.num_blocks(num_columns, chunk_size), len(lengths)
    length = torch.tensor(lengths)
    start = torch.tensor(positions) if positions is not None else torch.zeros(N, dtype=torch.int64)
    buffered = start % C
    count = -(-(buffered + length) // C)  # chunks per sequence
    offset = count.cumsum(0) - count
    n = int(count.sum())
    sequence = torch.repeat_interleave(torch.arange(N), count)
    first = start // C
    i = torch.arange(n)
    z = i - (offset - first)[sequence]
    end = (start + length) // C  # finished chunks per sequence
    deepest = int(torch.cat([z, end]).max())
    # With one chunk more than the deepest, the slot of that chunk is a block too, and no largest blocks join.
    heights = [(height.column - partition.first_column(C), height) for height in partition.heights(C, deepest + 1)]
    heights = [(number, height) for number, height in heights if number < M]
    tree = _Tree(z, sequence, first, offset - first, M if positions is not None else 0, M)

    def walk(z: Tensor, sequence: Tensor, reader: Tensor, columns: list[int]) -> list[Read]:
        reads = []
        for number, height in heights:
            for nearer in range(min(height.radix - 1, M - number)):
                reads += tree.read(number, height, nearer, z, sequence, reader, columns[number + nearer])
        return reads

    merges = [merge for (number, height), _ in pairwise(heights) for merge in tree.merge(number, height)]
    scan = tree.scan(*heights[-1], deepest)
    columns = [partition.block_column(number, num_columns, C) for number in range(M)]
    reads = walk(z, sequence, i, columns)
    turns = i.chunk(max(1, -(-len(reads) // READS_A_TURN)))
    final_reads = walk(end, torch.arange(N), torch.arange(N), list(range(M))) if final else []
    built = Schedule(
        partition,
        C,
        n,
        N,
        M,
        tree.initial_per_sequence,
        tree.num_prefixes,
        *_places(length, buffered, offset, n, C, positions is not None),
        merges,
        scan,
        reads,
        [walk(z[part], sequence[part], part, columns) for part in turns],
        final_reads,
    )
    return _to(built, device)


class _Tree:
    """Index arithmetic on the array of chunks: chunk i is chunk z[i] of sequence[i].

    Blocks have numbers, those of a state. A height comes with the number of its nearest block.
    """

    def __init__(
        self, z: Tensor, sequence: Tensor, first: Tensor, origin: Tensor, initial_per_sequence: int, num_blocks: int
    ) -> None:
        self.z, self.sequence, self.last = z, sequence, num_blocks - 1
        self.initial_per_sequence = initial_per_sequence
        self.first, self.origin = first, origin  # per sequence: its first chunk here; where its chunk 0 would lie
        self.num_prefixes = 0
        rows = len(z) + 1 + len(first) * initial_per_sequence
        self.prefix_row = torch.arange(rows)  # per row: the prefix up to its end

    def initial_row(self, sequence: Tensor, number: Tensor | int) -> Tensor:
        return len(self.z) + 1 + sequence * self.initial_per_sequence + number

    def row(self, number: int, height: Height, end: Tensor, sequence: Tensor) -> Tensor:
        """The row of the block, or of the prefix, up to chunk `end`, a multiple of the height's size."""
        first = self.first[sequence]
        nearer = first // height.size - end // height.size  # blocks of this size between it and the first chunk
        apart = (first // height.size % height.radix).clamp(max=self.last - number)
        outside = self.initial_row(sequence, torch.where(nearer < apart, number + nearer, self.last))
        return torch.where(end > first, self.origin[sequence] + end - 1, outside)

    def merge(self, number: int, height: Height) -> list[Merge]:
        """So many blocks join: the newest, in whose slot they do, takes up one older block after the other."""
        newest = torch.nonzero((self.z + 1) % (height.radix * height.size) == 0)[:, 0]
        merges = []
        for older in range(1, height.radix if len(newest) else 1):
            owner, end = self.sequence[newest], self.z[newest] + 1 - older * height.size
            left, right = self.row(number, height, end, owner), newest
            if not self.initial_per_sequence:
                inside = end > self.first[owner]
                left, right = left[inside], right[inside]
            if len(right):
                merges.append(Merge(left, right))
        return merges

    def read(
        self, number: int, height: Height, nearer: int, z: Tensor, sequence: Tensor, reader: Tensor, column: int
    ) -> list[Read]:
        """Readers at chunk z of sequence read the block (the last one: the prefix) that their walk meets after
        `nearer` blocks of its size."""
        blocks = z // height.size
        digit = blocks % height.radix
        is_last = number + nearer == self.last
        if is_last:
            blocks = blocks - digit.clamp(max=nearer)
            active = blocks > 0
        else:
            blocks, active = blocks - nearer, digit > nearer
        sequence, reader, end = sequence[active], reader[active], (blocks * height.size)[active]
        if not len(reader):
            return []
        source = self.row(number, height, end, sequence)
        if is_last:
            source = self.prefix_row[source]
        sources, row, width = torch.unique_consecutive(source, return_inverse=True, return_counts=True)
        place = torch.arange(len(row)) - (width.cumsum(0) - width)[row]
        readers = torch.full((len(sources), int(width.max())), len(self.z))
        readers[row, place] = reader
        return [Read(column, sources, readers)]

    def scan(self, number: int, height: Height, deepest: int) -> Scan | None:
        """Prefixes over the blocks of the last height of every sequence, if it holds the last block and a chunk's past
        has that one. Initial blocks come first: the older prefix, then the blocks that are apart from it."""
        apart = self.last - number  # blocks of this size are read apart before the prefix
        if apart >= height.radix - 1 or deepest // height.size <= apart:
            return None
        blocks = torch.nonzero((self.z + 1) % height.size == 0)[:, 0]
        owner = self.sequence[blocks]
        if self.initial_per_sequence:
            digit = self.first // height.size % height.radix
            older = self.first // height.size > digit.clamp(max=apart)
            found = [(torch.nonzero(older)[:, 0], self.last)]
            found += [(torch.nonzero(digit > nearer)[:, 0], number + nearer) for nearer in reversed(range(apart))]
            blocks = torch.cat([*(self.initial_row(sequences, number) for sequences, number in found), blocks])
            owner = torch.cat([*(sequences for sequences, _ in found), owner])
            order = torch.sort(owner, stable=True).indices
            blocks, owner = blocks[order], owner[order]
        prefixes = blocks
        if apart:
            self.num_prefixes = len(blocks)
            prefixes = len(self.prefix_row) + torch.arange(len(blocks))
            self.prefix_row[blocks] = prefixes
        _, width = torch.unique_consecutive(owner, return_counts=True)
        begin = torch.repeat_interleave(width.cumsum(0) - width, width)
        total = torch.repeat_interleave(width, width)
        rank = torch.arange(len(blocks)) - begin
        ups, downs = _scan_merges(rank, 1)
        mirrored_ups, mirrored_downs = _scan_merges(total - 1 - rank, -1)
        return Scan(blocks, prefixes, ups, downs, mirrored_ups, mirrored_downs, torch.nonzero(rank)[:, 0])


def _scan_merges(rank: Tensor, direction: int) -> tuple[list[Merge], list[Merge]]:
    """Brent and Kung's prefix circuit over runs that are numbered by `rank`: 2 log2(n) steps, 2 n merges."""
    position = torch.arange(len(rank))
    ups, downs = [], []
    size = 1
    while len(rank) and size <= int(rank.max()):
        right = position[(rank + 1) % (2 * size) == 0]
        ups.append(Merge(right - direction * size, right))
        right = position[((rank + 1) % (2 * size) == size) & (rank >= 2 * size)]
        downs.append(Merge(right - direction * size, right))
        size *= 2
    return ups, downs[::-1]


def _places(
    length: Tensor, buffered: Tensor, offset: Tensor, n: int, C: int, has_buffer: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the place of each token in the array of chunks, and the token at each place."""
    N = len(length)
    empty = n * C  # the first place of the empty chunk
    token_sequence = torch.repeat_interleave(torch.arange(N), length)
    start = length.cumsum(0) - length
    places = (offset * C + buffered - start)[token_sequence] + torch.arange(len(token_sequence))
    if has_buffer:
        slot = torch.arange(C).expand(N, C)
        in_buffer = torch.where(slot < buffered[:, None], offset[:, None] * C + slot, empty)
        places = torch.cat([in_buffer.flatten(), places])
    rows = torch.full(((n + 1) * C,), -1)
    rows[places] = torch.arange(len(places))
    rows[empty:] = -1
    padding = torch.nonzero(rows < 0)[:, 0]
    return rows.clamp(min=0), padding, places


def _to(x, device):  # type: ignore[no-untyped-def]
    """Move every tensor of nested frozen dataclasses and lists to the device."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, list):
        return [_to(item, device) for item in x]
    if hasattr(x, "__dataclass_fields__"):
        return type(x)(**{name: _to(getattr(x, name), device) for name in x.__dataclass_fields__})
    return x

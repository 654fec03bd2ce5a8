"""Who merges with whom and who reads what: the Fenwick tree of a batch, as index tensors.

All sequences' chunks lie in one array, ``num_chunks`` of them, followed by one empty chunk that fills short rows.
A sequence may begin in the middle of its history: chunk ``i`` of the array is chunk ``z[i]`` of its sequence, and the
states of the blocks before its first chunk z0 come from outside. They are extra rows behind the array, ``nodes``:
node ``m`` of a sequence is its block of ``2**m`` chunks, the last one its whole older prefix. So the rows of the slot
array are [chunks, empty chunk, nodes of sequence 0, nodes of sequence 1, ...].

Everything here is integer arithmetic on ``z``; see `loglinear.fenwick` for the same rules one position at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from loglinear.fenwick import block_cap, block_level

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
    """Each row of `readers` reads the slot in the same row of `sources`, weighted by the lambda of `level`."""

    level: int
    sources: Tensor  # [m] rows of the slot array, all different
    readers: Tensor  # [m, w] chunks (final blocks: sequences); short rows are filled with the empty chunk


@dataclass(frozen=True)
class Scan:
    """Turns the slots `entries` (blocks of the cap's size, in order) into prefixes, in log2 many merges."""

    entries: Tensor  # [n] rows of the slot array
    ups: list[Merge]  # positions in `entries`; they also compose the transitions
    downs: list[Merge]
    mirrored_ups: list[Merge]  # the same scan from right to left, for the backward
    mirrored_downs: list[Merge]
    successor: Tensor  # positions whose prefix continues the one before them


@dataclass(frozen=True)
class Schedule:
    chunk_size: int
    num_chunks: int
    num_sequences: int
    num_blocks: int  # block states per sequence, the prefix included
    nodes_per_sequence: int  # 0 without an initial state
    rows: Tensor  # [(num_chunks + 1) * C] the source token of each place; any token where `padding` lists it
    padding: Tensor  # places without a token
    places: Tensor  # [source tokens] the place of each source token; an empty chunk's for those left out
    merges: list[Merge]
    scan: Scan | None
    reads: list[Read]  # nearest blocks first; the last one may read prefixes
    turns: list[list[Read]]  # the same reads, a part of the chunks after the other; see READS_A_TURN
    final_reads: list[Read]  # the same walk from each sequence's end; `level` is the block's number

    @property
    def num_rows(self) -> int:
        return self.num_chunks + 1 + self.num_sequences * self.nodes_per_sequence


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached tensor made in inference mode could never be saved for a backward
def schedule(
    lengths: tuple[int, ...],
    positions: tuple[int, ...] | None,
    chunk_size: int,
    num_levels: int,
    final: bool,
    device: torch.device,
) -> Schedule:
    """The schedule of sequences of `lengths` new tokens that continue at `positions` (None: at 0, without a state).

    Source tokens are numbered [buffers of sequence 0, 1, ... (C each, only with positions), new tokens].
    """
    C, cap, N = chunk_size, block_cap(num_levels, chunk_size), len(lengths)
    length = torch.tensor(lengths)
    start = torch.tensor(positions) if positions is not None else torch.zeros(N, dtype=torch.int64)
    held = start % C
    count = -(-(held + length) // C)  # chunks per sequence
    offset = count.cumsum(0) - count
    n = int(count.sum())
    sequence = torch.repeat_interleave(torch.arange(N), count)
    first = start // C
    i = torch.arange(n)
    z = i - (offset - first)[sequence]
    end = (start + length) // C  # finished chunks per sequence
    tree = _Tree(z, sequence, first, offset - first, (cap + 1) if positions is not None else 0)
    deepest = int(torch.cat([z, end]).max())

    def walk(z: Tensor, sequence: Tensor, reader: Tensor, weights: list[int]) -> list[Read]:
        reads = []
        for level in range(min(cap, deepest.bit_length())):
            reads += tree.read(level, z, sequence, reader, weight=weights[level])
        if deepest >> cap:
            reads += tree.read(cap, z, sequence, reader, weight=weights[cap], prefix=True)
        return reads

    merges = [merge for level in range(min(cap, deepest.bit_length())) for merge in tree.merge(level)]
    scan = tree.scan(cap) if deepest >> cap else None
    levels = [block_level(size, num_levels, C) for size in range(cap + 1)]
    reads = walk(z, sequence, i, levels)
    turns = i.chunk(max(1, -(-len(reads) // READS_A_TURN)))
    final_reads = walk(end, torch.arange(N), torch.arange(N), list(range(cap + 1))) if final else []
    built = Schedule(
        C, n, N, cap + 1, tree.nodes, *_places(length, held, offset, n, C, positions is not None),
        merges, scan, reads, [walk(z[part], sequence[part], part, levels) for part in turns], final_reads,
    )  # fmt: skip
    return _to(built, device)


class _Tree:
    """Index arithmetic on the array of chunks: chunk i is chunk z[i] of sequence[i]."""

    def __init__(self, z: Tensor, sequence: Tensor, first: Tensor, origin: Tensor, nodes: int) -> None:
        self.z, self.sequence, self.nodes = z, sequence, nodes
        self.first, self.origin = first, origin  # per sequence: its first chunk here; where its chunk 0 would lie

    def node(self, sequence: Tensor, number: int) -> Tensor:
        return len(self.z) + 1 + sequence * self.nodes + number

    def merge(self, level: int) -> list[Merge]:
        """Blocks of 2**level chunks join in pairs; the left one may be a node."""
        size = 1 << level
        right = torch.nonzero((self.z + 1) % (2 * size) == 0)[:, 0]
        owner = self.sequence[right]
        inside = self.z[right] - size >= self.first[owner]
        left = torch.where(inside, right - size, self.node(owner, level))
        if not self.nodes:
            left, right = left[inside], right[inside]
        return [Merge(left, right)] if len(right) else []

    def read(
        self, level: int, z: Tensor, sequence: Tensor, reader: Tensor, *, weight: int, prefix: bool = False
    ) -> list[Read]:
        """Readers at chunk z of sequence read the block of 2**level chunks (or the prefix) that their walk meets."""
        head = z >> level
        active = head > 0 if prefix else head % 2 == 1
        sequence, reader, end = sequence[active], reader[active], (head << level)[active]
        if not len(reader):
            return []
        source = torch.where(end > self.first[sequence], self.origin[sequence] + end - 1, self.node(sequence, level))
        sources, row, width = torch.unique_consecutive(source, return_inverse=True, return_counts=True)
        column = torch.arange(len(row)) - (width.cumsum(0) - width)[row]
        readers = torch.full((len(sources), int(width.max())), len(self.z))
        readers[row, column] = reader
        return [Read(weight, sources, readers)]

    def scan(self, cap: int) -> Scan:
        """Prefix over the blocks of 2**cap chunks of every sequence; a node `cap` comes first, where there is one."""
        blocks = torch.nonzero((self.z + 1) % (1 << cap) == 0)[:, 0]
        owner = self.sequence[blocks]
        if self.nodes:
            sequences = torch.nonzero(self.first >> cap)[:, 0]
            blocks = torch.cat([self.node(sequences, cap), blocks])
            owner = torch.cat([sequences, owner])
            order = torch.sort(owner, stable=True).indices
            blocks, owner = blocks[order], owner[order]
        _, width = torch.unique_consecutive(owner, return_counts=True)
        begin = torch.repeat_interleave(width.cumsum(0) - width, width)
        total = torch.repeat_interleave(width, width)
        rank = torch.arange(len(blocks)) - begin
        ups, downs = _scan_merges(rank, 1)
        mirrored_ups, mirrored_downs = _scan_merges(total - 1 - rank, -1)
        return Scan(blocks, ups, downs, mirrored_ups, mirrored_downs, torch.nonzero(rank)[:, 0])


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
    length: Tensor, held: Tensor, offset: Tensor, n: int, C: int, buffered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the place of each token in the array of chunks, and the token at each place."""
    N = len(length)
    empty = n * C  # the first place of the empty chunk
    token_sequence = torch.repeat_interleave(torch.arange(N), length)
    start = length.cumsum(0) - length
    places = (offset * C + held - start)[token_sequence] + torch.arange(len(token_sequence))
    if buffered:
        slot = torch.arange(C).expand(N, C)
        in_buffer = torch.where(slot < held[:, None], offset[:, None] * C + slot, empty)
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

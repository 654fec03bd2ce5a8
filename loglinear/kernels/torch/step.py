"""The parts of a step that do not depend on the family.

With i the token's place in its chunk, one step is row i of the chunk formulas plus a read of every block state; only
when the chunk is full are the block states rewritten: transported to its end, and merged.
"""

# N sequences, C chunk, M blocks, H heads, G groups, K key, V value, L levels
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loglinear.fenwick import log2
from loglinear.kernels.torch.kept import kept
from loglinear.kernels.torch.recording import in_graph
from loglinear.partition import Partition

UNREACHED = 62  # the binary digit of 2**62, to which no position comes
LARGEST_TABLE = 256  # places of a chunk whose columns are kept: 576 KiB
SMALL_STATE = 1 << 21  # numbers of block states that are read faster than the few among them are found


def until(seen: Tensor, gates: Tensor) -> Tensor:
    """The chunks' log decays [N, C, H] or [N, C, H, K] as [N, H, C, D], with D = 1 or K.

    They are 0 behind the new tokens, whose places are so the chunks' ends.
    """
    gates = gates.transpose(1, 2)
    return torch.where(seen[..., None], gates[..., None] if gates.dim() == 3 else gates, 0.0)


def row_products(q: Tensor, k: Tensor, decay: Tensor) -> Tensor:
    """A row [N, H, C] of the gate's products: q [N, G, K] and k [N, G, C, K], with decay [N, H, C, D] to the query."""
    R = decay.shape[1] // k.shape[1]
    if decay.shape[-1] == 1:
        return (k @ q[..., None])[..., 0].repeat_interleave(R, 1) * decay[..., 0]
    return ((k.repeat_interleave(R, 1) * decay) @ q.repeat_interleave(R, 1)[..., None])[..., 0]


def row_scales(
    level_scales: Tensor, position: Tensor, chunk_size: int, num_blocks: int, partition: Partition
) -> tuple[Tensor, Tensor, Tensor]:
    """The places of each row's chunk up to its token's [N, 1, C]; their lambdas [N, H, C], 0 behind; the lambdas of the
    row's blocks [N, H, M], 0 for blocks that its past does not have."""
    N, H, L = level_scales.shape
    place, chunks = position % chunk_size, position // chunk_size
    tables = kept(_place_tables, position, chunk_size, L, partition) if chunk_size <= LARGEST_TABLE else None
    if tables is not None:
        columns, seen = (table[place] for table in tables)
    else:
        places, end = torch.arange(chunk_size, device=place.device), place[:, None]
        columns, seen = columns_between(end, places, partition).clamp(0, L - 1), places <= end
    seen = seen[:, None]
    to_place = torch.where(seen, level_scales.gather(2, columns[:, None].expand(N, H, chunk_size)), 0.0)
    of_blocks = level_scales[..., -num_blocks:]  # `Partition.block_column` of each
    has_block = has_blocks(chunks, num_blocks, chunk_size, partition)[:, None]
    return seen, to_place, torch.where(has_block, of_blocks, 0.0)


def _place_tables(
    chunk_size: int, num_levels: int, partition: Partition, device: torch.device
) -> tuple[Tensor, Tensor]:
    """[C, C] each: the columns of all places, seen from each, and whether they are seen."""
    places = torch.arange(chunk_size, device=device)
    end = places[:, None]
    return columns_between(end, places, partition).clamp(0, num_levels - 1), places <= end


def columns_between(t: Tensor, s: Tensor, partition: Partition) -> Tensor:
    """`Partition.index` of places t and s of a chunk; any number where s > t."""
    width = log2(partition.radix)
    if partition.finest_block > 1:
        t, s = t // partition.finest_block, s // partition.finest_block
    bits = torch.frexp((t ^ s).float()).exponent.long()  # bit_length
    if width == 1:
        return bits
    highest = (bits - 1).clamp(min=0) // width  # of the digits that differ
    return highest * (partition.radix - 1) + (t >> highest * width) - (s >> highest * width)


def rows_to_merge(full: Tensor) -> Tensor | slice | None:
    """The rows that are full, None if none is; all rows in a graph and on a GPU, where `merge_full` looks again.

    A graph cannot ask, and a GPU would wait for the answer.
    """
    if in_graph() or full.is_cuda:
        return slice(None)
    rows = full.nonzero()[:, 0]
    if len(rows) == len(full):
        return slice(None)  # views: no row is copied
    return rows if len(rows) else None


class Blocks(NamedTuple):
    """The blocks of a state, by their numbers."""

    number: Tensor  # [M]
    digit: Tensor  # [M] blocks of radix**digit chunks
    shift: Tensor  # [M] log2 of these chunks, where a position can have so many
    nearer: Tensor  # [M] blocks of the same size that are nearer
    modulus: Tensor  # [M] radix, or no bound where the block reaches, or its size counts, beyond the digit


def numbered(like: Tensor, num_blocks: int, chunk_size: int, partition: Partition) -> Blocks:
    """The numbers on a tensor's device."""
    choices = num_blocks, chunk_size, partition
    return kept(_numbered, like, *choices) or _numbered(*choices, like.device)


def _numbered(num_blocks: int, chunk_size: int, partition: Partition, device: torch.device) -> Blocks:
    number, last, radix = torch.arange(num_blocks, device=device), partition.last_digit(chunk_size), partition.radix
    is_open, digit, nearer = number == num_blocks - 1, number, torch.zeros_like(number)
    if last is not None or radix > 2:  # else a step of few operations is fast
        # A count, not a quotient: torch 2.11's compiler fails on quotients of indices that are moved by one.
        starts = number[:: radix - 1][1:]
        digit = (number[:, None] >= starts).sum(1).clamp(max=UNREACHED if last is None else last)
        is_open = is_open if last is None else is_open | (digit == last)
        nearer = number - digit * (radix - 1)
    shift = (digit * log2(radix)).clamp(max=UNREACHED)
    return Blocks(number, digit, shift, nearer, torch.where(is_open, 1 << UNREACHED, radix))


def has_blocks(chunks: Tensor, num_blocks: int, chunk_size: int, partition: Partition) -> Tensor:
    """[N, M]: `loglinear.partition.Partition.has_block` of each row's past."""
    blocks = numbered(chunks, num_blocks, chunk_size, partition)
    return (chunks[:, None] >> blocks.shift) % blocks.modulus > blocks.nearer


def block_tokens(
    chunks: Tensor, num_blocks: int, chunk_size: int, partition: Partition, first: Tensor | None = None
) -> Tensor:
    """[N, M]: the tokens of each block of each row's past, 0 for a block that it does not have; see `tokens_from`."""
    blocks = numbered(chunks, num_blocks, chunk_size, partition)
    sizes = chunk_size << blocks.shift
    tokens = torch.where(has_blocks(chunks, num_blocks, chunk_size, partition), sizes, 0)
    others = tokens[:, :-1]
    end = chunks * chunk_size
    tokens = torch.cat([others, end[:, None] - others.sum(1, keepdim=True)], 1)
    return tokens if first is None else tokens_from(first, tokens, end)


def tokens_from(first: Tensor, tokens: Tensor, end: Tensor) -> Tensor:
    """[..., M]: how many of the tokens of buckets are at position `first` [...] or later.

    The buckets lie side by side, nearest first. The nearest ends before position `end` [...].
    """
    ends = end[..., None] - (tokens.cumsum(-1) - tokens)
    return (ends - torch.maximum(ends - tokens, first[..., None])).clamp(min=0)


def read_blocks(queries: Tensor, blocks: Tensor, weights: Tensor) -> Tensor:
    """sum over m of weights[m] * q^T S_m; queries [N,H,K], blocks [N,M,H,K,V], weights [N,H,M] -> [N,H,V].

    Where few weights of each head are not 0, only so many blocks are read.
    """
    most = _most_read(blocks, weights)
    if most is None:
        reads = (queries[:, None, :, None, :] @ blocks)[:, :, :, 0]
        return (weights.transpose(1, 2)[..., None] * reads).sum(1)
    N, M, H, K, V = blocks.shape
    number = (weights == 0).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]  # [N, H, most], nearest first
    row, head = (torch.arange(n, device=blocks.device) for n in (N, H))
    places = (row[:, None, None] * M + number) * H + head[:, None]
    chosen = blocks.flatten(0, 2).index_select(0, places.flatten()).view(N, H, most, K, V)
    reads = (queries[:, :, None, None, :] @ chosen)[:, :, :, 0]
    return (weights.gather(2, number)[..., None] * reads).sum(2)


def _most_read(blocks: Tensor, weights: Tensor) -> int | None:
    """The most blocks that a head of a row reads, if a copy of so many is faster than a read of all; else None.

    A copy is read, written and read again. A graph cannot ask for the number, and a GPU would wait for the answer.
    """
    if blocks.numel() < SMALL_STATE or blocks.is_cuda or in_graph():
        return None
    most = int(weights.count_nonzero(2).max())
    return most if 3 * most < blocks.shape[1] else None


def _joined_sizes(num_blocks: int, radix: int, device: torch.device) -> Tensor:
    """The chunks of a block, from the second size on."""
    digits = torch.arange(1, (num_blocks - 1) // (radix - 1) + 2, device=device)
    return 1 << (digits * log2(radix)).clamp(max=UNREACHED)


def merge_full(
    blocks: Tensor,
    transported: Tensor,
    chunk_state: Tensor,
    chunks: Tensor,
    full: Tensor,
    chunk_size: int,
    partition: Partition,
) -> Tensor:
    """The block states after `chunks` finished chunks, in the rows that are `full`.

    With p the trailing zeros of `chunks` in base r, the blocks of fewer than r**p chunks and the new chunk become the
    nearest block of r**p chunks. It pushes the others of this size one number up; the last block takes all in.
    """
    M, radix = blocks.shape[1], partition.radix
    known = numbered(blocks, M, chunk_size, partition)
    last = partition.last_digit(chunk_size)
    sizes = kept(_joined_sizes, blocks, M, radix)
    sizes = _joined_sizes(M, radix, blocks.device) if sizes is None else sizes
    height = (chunks[:, None] % sizes == 0).sum(1, keepdim=True)
    if last is not None:
        height = height.clamp(max=last)
    target = (height * (radix - 1)).clamp(max=M - 1)
    had = has_blocks(chunks - 1, M, chunk_size, partition)
    stays = (known.digit > height) | (known.number == M - 1) & had
    moves = (known.digit == height) & (known.number < M - 1) & had
    shape = (*blocks.shape[:2], 1, 1, 1)
    joined = (known.number < target).to(blocks.dtype)[:, None] @ transported.flatten(2)
    merged = torch.where(stays.view(shape), transported, 0.0)
    if radix > 2 or partition.largest_block is not None:  # else a block has no neighbour of its size: two become one
        moved = torch.where(moves.view(shape), transported, 0.0)
        merged = merged + torch.cat([torch.zeros_like(moved[:, :1]), moved[:, :-1]], 1)
    joined = joined.unflatten(2, chunk_state.shape[1:]) + chunk_state[:, None]
    merged = merged.addcmul_(joined, (known.number == target).to(blocks.dtype).view(shape))
    return torch.where(full[:, None, None, None, None], merged, blocks) if in_graph() or full.is_cuda else merged

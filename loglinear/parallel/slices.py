"""The slices of sequences that lie on several devices: the tokens that each rank holds."""

# B batch, T time, R ranks, N sequences, C chunk
from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from loglinear.ops import BucketScores
from loglinear.ops.validation import chunk_length, whole_number
from loglinear.parallel import convolution, operators, scores
from loglinear.parallel.collectives import all_gather, between_graphs, joined, mean_gradient_sum


class Part(NamedTuple):
    """Consecutive tokens of a slice that one call of an operator takes."""

    begin: int
    """Its first token, counted from the beginning of the slice."""
    end: int
    """The token after its last one."""
    position: int
    """The position of its first token in its document."""
    documents: tuple[int, ...] | None
    """Boundaries of whole documents, from 0; None: one document, or the rows of a batch."""
    goes_on: bool
    """True if the next slice continues its document."""

    @property
    def last_position(self) -> int:
        """The position after its last token in its document."""
        return self.position + self.end - self.begin


@dataclass(frozen=True)
class Slices:
    """The tokens that each rank of a mesh dimension holds; rank r holds those from boundaries[r] to boundaries[r + 1].

    Make it with `Slices.of`. Models take it as their argument `slices`.
    """

    boundaries: tuple[int, ...]
    """[R + 1] places in the whole row, from 0 to T."""
    documents: tuple[int, ...] | None
    """Boundaries of the packed documents in the whole row; None: each row of the batch is one sequence."""
    chunk_size: int
    """Every document that two slices share is cut at a multiple of it."""
    rank: int
    """The rank of this process in the mesh dimension."""
    group: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)
    """The processes of the mesh dimension; None: a plan without them."""

    @classmethod
    def of(
        cls,
        time: int,
        mesh: DeviceMesh,
        *,
        chunk_size: int,
        cu_seqlens: Tensor | Sequence[int] | None = None,
    ) -> Slices:
        """Return the slices of rows of `time` tokens on the devices of a mesh of one dimension.

        Slice r begins at token r n, where n is the smallest multiple of chunk_size with R n >= T. If that is inside
        a packed document, slice r begins at the last multiple of chunk_size in this document, at or before r n. The
        last ranks may hold fewer tokens, or none. A rank without tokens computes one token of padding.

        Args:
            time: T, the tokens of a row.
            mesh: The mesh of one dimension, as mesh["cp"].
            chunk_size: A multiple of the operators' chunks.
            cu_seqlens: [n + 1] integers from 0 to T, non-decreasing: the boundaries of packed documents (B = 1).

        Raises:
            ValueError: An argument does not fit; the message names it.
        """
        if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
            found = f"one of {mesh.ndim} dimensions" if isinstance(mesh, DeviceMesh) else type(mesh).__name__
            raise ValueError(f'mesh must be a DeviceMesh of one dimension, as mesh["cp"], got {found}')
        plan = cls.plan(time, mesh.size(), chunk_size=chunk_size, cu_seqlens=cu_seqlens)
        return cls(plan.boundaries, plan.documents, plan.chunk_size, mesh.get_local_rank(), mesh.get_group())

    @classmethod
    def plan(
        cls,
        time: int,
        ranks: int,
        *,
        chunk_size: int,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        rank: int = 0,
    ) -> Slices:
        """Return the slices on so many ranks, without processes.

        Examples:
            >>> Slices.plan(100, 3, chunk_size=16).boundaries
            (0, 48, 96, 100)
            >>> Slices.plan(100, 3, chunk_size=16, cu_seqlens=[0, 20, 100]).boundaries
            (0, 36, 84, 100)
            >>> Slices.plan(20, 3, chunk_size=16).boundaries
            (0, 16, 20, 20)

        Raises:
            ValueError: An argument does not fit; the message names it.
        """
        time, ranks = whole_number("time", time), whole_number("ranks", ranks)
        chunk_size = chunk_length("chunk_size", chunk_size)
        documents = None if cu_seqlens is None else _documents(cu_seqlens, time)
        length = -(-time // (ranks * chunk_size)) * chunk_size
        boundaries = [min(r * length, time) for r in range(ranks + 1)]
        if documents is not None:
            begins = [_begin(documents, boundary) for boundary in boundaries]
            boundaries = [
                boundary if begin is None else begin + (boundary - begin) // chunk_size * chunk_size
                for boundary, begin in zip(boundaries, begins, strict=True)
            ]
        return cls(tuple(boundaries), documents, chunk_size, rank)

    @property
    def ranks(self) -> int:
        """R."""
        return len(self.boundaries) - 1

    @property
    def lengths(self) -> list[int]:
        """[R] the tokens of each rank."""
        return [end - begin for begin, end in pairwise(self.boundaries)]

    @property
    def length(self) -> int:
        """The tokens of this rank."""
        return self.lengths[self.rank]

    @cached_property
    def begins(self) -> list[int | None]:
        """[R + 1] The begin of the document that each boundary cuts; None for a boundary between two documents."""
        documents = (0, self.boundaries[-1]) if self.documents is None else self.documents
        return [_begin(documents, boundary) for boundary in self.boundaries]

    @cached_property
    def spans(self) -> tuple[tuple[int, int] | None, ...]:
        """[R] The positions, first and end, of each slice in the document that goes on in the next slice; or None."""
        cuts = zip(pairwise(self.boundaries), self.begins[1:], strict=True)
        return tuple(None if begin is None else (max(first - begin, 0), end - begin) for (first, end), begin in cuts)

    @cached_property
    def older(self) -> list[int]:
        """The ranks that hold older tokens of the document that this slice continues, oldest first."""
        begin = self.begins[self.rank]
        return [] if begin is None else [r for r in range(self.rank) if self.boundaries[r + 1] > begin]

    @cached_property
    def position(self) -> int:
        """The position of this slice's first token in its document."""
        begin = self.begins[self.rank]
        return 0 if begin is None else self.boundaries[self.rank] - begin

    @cached_property
    def parts(self) -> list[Part]:
        """At least one of: the rest of an older document, whole documents, the beginning of one that goes on."""
        length = max(self.length, 1)
        goes_on = self.begins[self.rank + 1] is not None
        if self.documents is None:
            return [Part(0, length, self.position, None, goes_on)]
        ends = [*self._inner_boundaries(), length]
        parts, begin = [], 0
        if self.position:
            begin = ends[0]
            parts.append(Part(0, begin, self.position, None, goes_on and begin == length))
        last = [0, *ends][-2] if goes_on else length
        if begin < last:
            inside = (0, *(end - begin for end in ends if begin < end <= last))
            parts.append(Part(begin, last, 0, inside, False))
        if max(begin, last) < length:
            parts.append(Part(last, length, 0, None, True))
        return parts

    @cached_property
    def cu_seqlens(self) -> Tensor | None:
        """[n + 1] The boundaries of the documents in this slice; None: not packed."""
        if self.documents is None:
            return None
        return torch.tensor([0, *self._inner_boundaries(), max(self.length, 1)])

    def _inner_boundaries(self) -> list[int]:
        """Return the boundaries of packed documents inside of this slice."""
        first, end = self.boundaries[self.rank], self.boundaries[self.rank + 1]
        return [] if self.documents is None else [place - first for place in self.documents if first < place < end]

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's part of x, whose dimension `dim` has T places.

        A rank without tokens has one place of zeros.

        Raises:
            ValueError: x has another number of places.
        """
        if x.shape[dim] != self.boundaries[-1]:
            raise ValueError(f"x must have {self.boundaries[-1]} places in dimension {dim}, got {list(x.shape)}")
        if self.length == 0:
            return torch.cat([x.narrow(dim, 0, 0), torch.zeros_like(x.narrow(dim, 0, 1))], dim)  # joins the graph of x
        return x.narrow(dim, self.boundaries[self.rank], self.length)

    @between_graphs
    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return the whole of x on every rank, from each rank's part; the backward pass sums all ranks' gradients.

        Raises:
            ValueError: x does not have this rank's number of places.
        """
        self.check_time("x", x, dim)
        x = x.movedim(dim, 0)
        padded = F.pad(x, (*[0, 0] * (x.dim() - 1), 0, max(*self.lengths, 1) - len(x)))
        whole = torch.cat([part[:n] for part, n in zip(all_gather(padded, self.processes), self.lengths, strict=True)])
        return whole.movedim(0, dim)

    @between_graphs
    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of x over all ranks, the same on each.

        The gradient on each rank is R times that of its own part. So the mean of the ranks' gradients, which
        data-parallel training takes, is the gradient of the sum.
        """
        return mean_gradient_sum(x, self.processes)

    @between_graphs
    def inputs_before(self, x: Tensor, kernel: int, boundaries: Tensor | None) -> Tensor | None:
        """Return a convolution's state from the ranks that hold the tokens before; see `convolution.inputs_before`.

        Raises:
            ValueError: x is packed in another number of documents than `cu_seqlens` has.
        """
        found, expected = (None if ends is None else len(ends) - 1 for ends in (boundaries, self.cu_seqlens))
        if found != expected:
            if expected is None:
                raise ValueError(f"packing must be None for slices without cu_seqlens, got one of {found} documents")
            made = f"packing must be made from slices.cu_seqlens, with the {expected} documents of this slice"
            raise ValueError(f"{made}, got {found}")
        return convolution.inputs_before(self, x, kernel)

    @between_graphs
    def attend(self, transition: str, tensors: list[Tensor | None], weights: Tensor, **options: Any) -> Tensor:
        """Return the output of the operator of a transition, "scalar_gate" or "delta_rule", for this rank's tokens."""
        return operators.OPERATORS[transition](*tensors, weights, slices=self, **options)

    @between_graphs
    def scores(self, q: Tensor, k: Tensor, **options: Any) -> BucketScores:
        """Return the scores of buckets for this rank's tokens; see `scores.bucket_scores`."""
        return scores.bucket_scores(q, k, slices=self, **options)

    @between_graphs
    def with_older_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return softmax attention's keys and values [B, G, position + n, K], this rank's k and v [B, G, n, K] last.

        The older ones are those of the document that this slice continues. One all-gather has the keys and values of
        all slices; the backward pass sends their gradients with one reduce-scatter.
        """
        gathered = self.gather(torch.cat([k, v], -1), dim=2)
        if self.length == 0:
            return joined(k, gathered), v
        end = self.boundaries[self.rank] + self.length
        both = gathered[:, :, end - self.length - self.position : end]
        return both[..., : k.shape[-1]], both[..., k.shape[-1] :]

    @property
    def processes(self) -> dist.ProcessGroup:
        """The processes of the mesh dimension; ValueError for a plan without them."""
        if self.group is None:
            raise ValueError("slices must come from Slices.of(..., mesh), got a plan without processes")
        return self.group

    def check_time(self, name: str, x: Tensor, dim: int = 1) -> None:
        """Raise ValueError unless x has this rank's number of places."""
        expected = max(self.length, 1)
        if x.shape[dim] != expected:
            raise ValueError(f"{name} must have the {expected} tokens of this rank's slice, got {list(x.shape)}")


def _begin(documents: tuple[int, ...], place: int) -> int | None:
    """Return the begin of the document that this place cuts; None for a place between two documents."""
    following = bisect_left(documents, place)
    return None if documents[following] == place else documents[following - 1]


def _documents(cu_seqlens: Tensor | Sequence[int], time: int) -> tuple[int, ...]:
    """Return the boundaries of the documents that have tokens."""
    given = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    if len(given) < 2 or given[0] != 0 or given[-1] != time or given != sorted(given):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens ({time}), got {given}")
    return tuple(sorted(set(given)))

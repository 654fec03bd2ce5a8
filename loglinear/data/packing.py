"""Rows of the same number of tokens for training and evaluation: pieces of documents, packed with cu_seqlens.

# P pieces, R tokens of a row, B documents of T tokens
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from loglinear.data.corpus import Corpus

IGNORED = -100  # the label without a loss


def pieces(corpus: Corpus, seq_len: int) -> np.ndarray:
    """Return int64 [P, 2]: start and end of consecutive pieces of at most `seq_len` tokens of every document."""
    starts, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for begin, end in zip(corpus.offsets_D[:-1], corpus.offsets_D[1:], strict=True):
        cuts = np.arange(begin, end, seq_len)
        starts.append(cuts)
        ends.append(np.minimum(cuts + seq_len, end))
    return np.stack([np.concatenate(starts), np.concatenate(ends)], axis=1)


def pieces_by_rounds(corpus: Corpus, seq_len: int) -> np.ndarray:
    """Return `pieces` in another order: the first pieces of all documents, then the second ones, and so on.

    The beginning of this order is the fairest sample of a corpus for a limited number of tokens.
    """
    parts_P2 = pieces(corpus, seq_len)
    documents_P = corpus.document_of(parts_P2[:, 0])
    rounds_P = (parts_P2[:, 0] - corpus.offsets_D[documents_P]) // seq_len
    return parts_P2[np.lexsort((documents_P, rounds_P))]


def pack(parts: Iterable[np.ndarray], learnt: Iterable[np.ndarray] = ()) -> dict[str, Tensor]:
    """Return one row for the model: input_ids and labels [1, R], cu_seqlens [n + 1].

    No label crosses into another part. `learnt` holds masks of the tokens of each part that count in the loss; without
    it all count.
    """
    arrays, masks = list(parts), list(learnt)
    input_ids = np.concatenate(arrays).astype(
        np.int64
    )  # numpy, because torch would wake all cores for each small operation
    cu_seqlens = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    labels = input_ids.copy()
    labels[cu_seqlens[:-1]] = IGNORED  # nothing predicts the first token of a sequence
    if masks:
        labels[~np.concatenate(masks)] = IGNORED
    row = {"input_ids": input_ids[None], "labels": labels[None], "cu_seqlens": cu_seqlens}
    return {name: torch.from_numpy(array) for name, array in row.items()}


class PackedRows(Dataset):
    """The rows of a training run: `row_tokens` tokens of pieces each, in another order in every epoch.

    An epoch lays all pieces end to end and cuts rows from that. A piece that is cut at the end of a row continues in
    the next row as a sequence of its own. `shuffle_seed` decides the order; None means that of `pieces_by_rounds`.
    With `jitter` a row has the `initial_position` of each sequence, at random below it, from this seed and the row.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seq_len: int,
        row_tokens: int,
        shuffle_seed: int | None,
        rows: int | None = None,
        jitter: int | None = None,
    ) -> None:
        self.corpus, self.seed, self.jitter = corpus, shuffle_seed, jitter
        self.pieces_P2 = pieces_by_rounds(corpus, seq_len)
        total = len(corpus.tokens)
        if shuffle_seed is None and total < row_tokens:
            row_tokens = total  # a small validation text is one short row
        self.row_tokens = row_tokens
        self.rows_per_epoch = total // row_tokens
        if self.rows_per_epoch == 0:
            raise ValueError(
                f"the training data has {total:,} tokens and one batch takes {row_tokens:,}: "
                "give more data or lower --batch-tokens"
            )
        self.rows = self.rows_per_epoch if rows is None else rows
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.rows

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the pieces of an epoch in order [P, 2], and the place where each begins in its stream [P + 1]."""
        if self._epoch is None or self._epoch[0] != epoch:
            order_P2 = self.pieces_P2
            if self.seed is not None:
                order_P2 = order_P2[np.random.default_rng([self.seed, epoch]).permutation(len(order_P2))]
            begins = np.concatenate([[0], np.cumsum(order_P2[:, 1] - order_P2[:, 0])])
            self._epoch = (epoch, order_P2, begins)
        return self._epoch[1], self._epoch[2]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        places = [slice(*span) for span in self._spans_P2(index)]
        row = pack((self.corpus.tokens[p] for p in places), (self.corpus.learnt[p] for p in places))
        if self.jitter is None:
            return row
        rng = np.random.default_rng([self.seed or 0, index, self.jitter])
        return {**row, "initial_position": torch.from_numpy(rng.integers(self.jitter, size=len(places)))}

    def predicted(self, rows: range) -> tuple[int, float]:
        """Return the number of tokens that count in the loss of these rows, and their bytes of text."""
        return self.corpus.predicted_in(np.concatenate([self._spans_P2(row) for row in rows]))

    def _spans_P2(self, index: int) -> np.ndarray:
        """Return the start and the end of the sequences of a row."""
        epoch, row = divmod(index, self.rows_per_epoch)
        order_P2, begins = self._epoch_order(epoch)
        row_start, row_end = row * self.row_tokens, (row + 1) * self.row_tokens
        first = np.searchsorted(begins, row_start, side="right") - 1
        last = np.searchsorted(begins, row_end, side="left")
        starts_P, ends_P = order_P2[first:last].T
        lows_P = starts_P + np.maximum(0, row_start - begins[first:last])
        highs_P = np.minimum(ends_P, starts_P + row_end - begins[first:last])
        return np.stack([lows_P, highs_P], axis=1)


class EqualRows(PackedRows):
    """The rows of documents that all have `seq_len` tokens: input_ids and labels [B, T], B documents of T tokens.

    They need no boundaries, and have one shape, so that a CUDA graph of a step serves every row. The documents of a row
    are those of `PackedRows`.

    Raises ValueError for a document of another length, for rows that would cut one, and for a jitter.
    """

    def __init__(self, corpus: Corpus, *, seq_len: int, jitter: int | None = None, **options: Any) -> None:
        super().__init__(corpus, seq_len=seq_len, **options)
        lengths_D = np.diff(corpus.offsets_D)
        if (lengths_D != seq_len).any():
            other = int(lengths_D[lengths_D != seq_len][0])
            raise ValueError(f"batches of whole documents need {seq_len} tokens in each, got one of {other}")
        if self.row_tokens % seq_len:
            raise ValueError(f"--batch-tokens must be a multiple of the documents' {seq_len}, got {self.row_tokens}")
        if jitter is not None:
            raise ValueError(f"batches of whole documents start at position 0, got a jitter of {jitter}")
        self.places_T = np.arange(seq_len)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        places_BT = self._spans_P2(index)[:, :1] + self.places_T
        input_ids = self.corpus.tokens[places_BT].astype(np.int64)
        labels = np.where(self.corpus.learnt[places_BT], input_ids, IGNORED)
        labels[:, 0] = IGNORED  # nothing predicts the first token of a sequence
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}

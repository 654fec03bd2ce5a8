"""Tokenised documents, their split into training and validation, and packing into rows with cu_seqlens.

# D documents, P pieces, R tokens of a row
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from loglinear.training.sources import Document, name_hash, read_documents
from loglinear.training.tokenizer import encode_documents

IGNORED = -100  # the label without a loss


@dataclass(frozen=True)
class Corpus:
    """Documents in one array of tokens, in the fixed, arbitrary order of the hashes of their names."""

    names: tuple[str, ...]
    tokens: np.ndarray  # all documents end to end
    offsets_D: np.ndarray  # int64 [D + 1]; document d is tokens[offsets_D[d] : offsets_D[d + 1]]
    bytes_D: np.ndarray  # int64 [D]; UTF-8 bytes of each document's text
    learnt: np.ndarray  # bool: the tokens that count in the loss
    special: tuple[int, ...]  # tokens without text: beginning and end of a document

    @cached_property
    def bytes_per_text_token_D(self) -> np.ndarray:
        """The bytes of each document's text per token that is not special: exactly 1 for byte tokens."""
        counts_D = [self._is_text(self.document(d)).sum() for d in range(len(self.names))]
        return self.bytes_D / np.maximum(1, np.array(counts_D, dtype=np.int64))

    def token_bytes(self, start: int, end: int) -> np.ndarray:
        """Return the bytes of text for each of tokens[start:end], which must be a part of one document.

        Special tokens have no bytes; all other tokens of a document have equally many. This is exact for the byte
        tokenizer, and for any tokenizer in the sum over a document.
        """
        return self.bytes_per_text_token_D[self.document_of(end - 1)] * self._is_text(self.tokens[start:end])

    def predicted_in(self, spans_P2: np.ndarray) -> tuple[int, float]:
        """Return the number of tokens that count in the loss of some spans, and their bytes as in `token_bytes`.

        A span is a part of one document. Its first token is never predicted.
        """
        begins_P, ends_P = spans_P2[:, 0] + 1, spans_P2[:, 1]
        span_N = np.repeat(np.arange(len(spans_P2)), ends_P - begins_P)
        inner = [slice(*span) for span in zip(begins_P, ends_P, strict=True)]
        learnt_N = np.concatenate([self.learnt[part] for part in inner])
        text_N = self._is_text(np.concatenate([self.tokens[part] for part in inner]))
        counts_P = np.bincount(span_N[learnt_N & text_N], minlength=len(spans_P2))
        return int(learnt_N.sum()), float(counts_P @ self.bytes_per_text_token_D[self.document_of(spans_P2[:, 0])])

    def _is_text(self, tokens: np.ndarray) -> np.ndarray:
        text = np.ones(len(tokens), bool)
        for token in self.special:  # there are two, and this is faster than np.isin
            text &= tokens != token
        return text

    def document_of(self, place: ArrayLike) -> Any:
        """Return the document of a place in `tokens`, or the documents of several places."""
        return np.searchsorted(self.offsets_D, place, side="right") - 1

    @cached_property
    def fingerprint(self) -> str:
        """A hash of names, boundaries and tokens. Equal fingerprints mean equal data."""
        digest = hashlib.blake2b("\0".join(self.names).encode(), digest_size=16)
        digest.update(self.offsets_D.tobytes())
        digest.update(self.tokens.tobytes())
        if not self.learnt.all():
            digest.update(np.packbits(self.learnt).tobytes())
        return digest.hexdigest()

    def document(self, d: int) -> np.ndarray:
        """Return the tokens of document d."""
        return self.tokens[self._place(d)]

    def _place(self, d: int) -> slice:
        return slice(self.offsets_D[d], self.offsets_D[d + 1])

    def take(self, documents: Iterable[int]) -> Corpus:
        """Return the corpus of these documents only."""
        places = [(d, self._place(d)) for d in documents]
        parts = [_Part(self.names[d], self.tokens[p], self.learnt[p], int(self.bytes_D[d])) for d, p in places]
        return _corpus(parts, self.special)


class _Part(NamedTuple):
    """One document of a corpus."""

    name: str
    tokens: np.ndarray
    learnt: np.ndarray
    size: int


def _corpus(parts: list[_Part], special: tuple[int, ...]) -> Corpus:
    return Corpus(
        names=tuple(part.name for part in parts),
        tokens=np.concatenate([part.tokens for part in parts]) if parts else np.zeros(0, np.uint16),
        offsets_D=np.cumsum([0, *(len(part.tokens) for part in parts)], dtype=np.int64),
        bytes_D=np.asarray([part.size for part in parts], dtype=np.int64),
        learnt=np.concatenate([part.learnt for part in parts]) if parts else np.zeros(0, bool),
        special=special,
    )


def tokenize(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Return documents as tokens in memory: 2 bytes for each byte of text with the byte tokenizer."""
    measured, texts = itertools.tee((document, _size(document)) for document in documents)
    encoded = encode_documents(tokenizer, ((document.text, document.learnt) for document, _ in texts))
    parts = [
        _Part(document.name, tokens, learnt, size)
        for (document, size), (tokens, learnt) in zip(measured, encoded, strict=True)
    ]
    special = tuple(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None)
    return _corpus(sorted(parts, key=lambda part: (name_hash(part.name), part.name)), special)


def _size(document: Document) -> int:
    """Return the number of UTF-8 bytes of a document."""
    try:
        return len(document.text.encode())
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair
        raise ValueError(f"document {document.name} is not text: character {error.start} is a lone surrogate") from None


def split(corpus: Corpus, validation_fraction: float) -> tuple[Corpus, Corpus]:
    """Return (training, validation). A document whose name hashes below the fraction validates as a whole.

    The choice depends on the name alone, so a document never changes sides when others are added. Both sides always
    have text. If the hash puts all documents on one side, the first or last one in hash order changes sides. A single
    document is cut, and its end validates.
    """
    count = len(corpus.names)
    if count == 1:
        return _cut_single(corpus, validation_fraction)
    chosen = sum(name_hash(name) < validation_fraction for name in corpus.names)  # documents are in hash order
    chosen = min(max(chosen, 1), count - 1)
    return corpus.take(range(chosen, count)), corpus.take(range(chosen))


def _cut_single(corpus: Corpus, validation_fraction: float) -> tuple[Corpus, Corpus]:
    tokens = corpus.tokens
    cut = len(tokens) - max(1, int(len(tokens) * validation_fraction))
    train, validation = (
        _Part(corpus.names[0], tokens[start:end], corpus.learnt[start:end], round(corpus.token_bytes(start, end).sum()))
        for start, end in ((0, cut), (cut, len(tokens)))
    )
    return _corpus([train], corpus.special), _corpus([validation], corpus.special)


def load_corpus(
    sources: Iterable[str], tokenizer: PreTrainedTokenizerBase, validation_fraction: float, *, progress: bool = False
) -> tuple[Corpus, Corpus]:
    """Read, tokenise and split sources. Return (training, validation)."""
    return split(read_corpus(sources, tokenizer, progress=progress), validation_fraction)


def read_corpus(sources: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, progress: bool = False) -> Corpus:
    """Read and tokenise sources. With `progress` a bar appears after a second."""
    documents = tqdm(
        read_documents(sources), desc="reading", unit=" documents", disable=not progress, leave=False, delay=1
    )
    return tokenize(documents, tokenizer)


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
    """

    def __init__(
        self, corpus: Corpus, *, seq_len: int, row_tokens: int, shuffle_seed: int | None, rows: int | None = None
    ) -> None:
        self.corpus, self.seed = corpus, shuffle_seed
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
        return pack((self.corpus.tokens[p] for p in places), (self.corpus.learnt[p] for p in places))

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

"""Tokenised documents, and their split into training and validation.

# D documents, P pieces, N tokens of several pieces
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from loglinear.data.sources import Document, name_hash, read_documents
from loglinear.data.tokenizer import encode_documents


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
        spans_P2 = spans_P2[spans_P2[:, 1] - spans_P2[:, 0] > 1]
        if not len(spans_P2):
            return 0, 0.0
        # Counts before every token would save this copy, and take more memory than the tokens.
        places = [slice(begin + 1, end) for begin, end in spans_P2.tolist()]
        learnt_N = np.concatenate([self.learnt[place] for place in places])
        text_N = learnt_N & self._is_text(np.concatenate([self.tokens[place] for place in places]))
        lengths_P = spans_P2[:, 1] - spans_P2[:, 0] - 1
        text_P = np.add.reduceat(text_N, np.cumsum(lengths_P) - lengths_P, dtype=np.int64)
        bytes_P = self.bytes_per_text_token_D[self.document_of(spans_P2[:, 0])]
        return int(np.count_nonzero(learnt_N)), float(text_P @ bytes_P)

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
        return _corpus([self.part(d) for d in documents], self.special)

    def part(self, d: int) -> _Part:
        """Return document d with all that is known of it."""
        place = self._place(d)
        return _Part(self.names[d], self.tokens[place], self.learnt[place], int(self.bytes_D[d]))


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
    measured, texts = itertools.tee((document, len(document.encode())) for document in documents)
    encoded = encode_documents(tokenizer, ((document.text, document.learnt) for document, _ in texts))
    parts = [
        _Part(document.name, tokens, learnt, size)
        for (document, size), (tokens, learnt) in zip(measured, encoded, strict=True)
    ]
    special = tuple(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None)
    return _corpus(sorted(parts, key=lambda part: (name_hash(part.name), part.name)), special)


def join(corpora: Sequence[Corpus]) -> Corpus:
    """Return the corpus of all documents of several, which have different names: as if they were tokenised together."""
    places = [(name_hash(name), name, c, d) for c, corpus in enumerate(corpora) for d, name in enumerate(corpus.names)]
    parts = [corpora[c].part(d) for *_, c, d in sorted(places)]
    return _corpus(parts, corpora[0].special)


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

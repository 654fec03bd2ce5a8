"""Pieces of real text, all of one length: some train a model, others a reference model, and others are held out."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from loglinear.data.corpus import Corpus
from loglinear.data.sources import Document, read_documents
from loglinear.models import ByteTokenizer

NAME = "pieces"
HELD_OUT = 1024  # pieces that no model reads
ASCII = 128


class TextPieces(NamedTuple):
    """The sizes of a dataset: N pieces of S bytes of a source of text."""

    sequences: int
    """N."""
    length: int
    """S."""
    reserved: int
    """The pieces that the reference model reads, and no other model."""
    text: str
    """The source, as in `loglinear.data.sources`."""

    @property
    def source(self) -> str:
        """The name of the dataset among a recipe's data: pieces:N:S:RESERVED:TEXT."""
        return f"{NAME}:{self.sequences}:{self.length}:{self.reserved}:{self.text}"

    @staticmethod
    def from_source(source: str) -> TextPieces:
        """Return the sizes in a name that `source` gave. Raises ValueError for another name."""
        name, *parts = source.split(":", 4)
        if name == NAME and len(parts) == 4 and all(part.isdecimal() for part in parts[:3]):
            sequences, length, reserved = map(int, parts[:3])
            return TextPieces(sequences, length, reserved, parts[3])
        raise ValueError(f"expected pieces of text as {NAME}:SEQUENCES:LENGTH:RESERVED:TEXT, got {source!r}")

    def corpora(self, seed: int) -> tuple[Corpus, Corpus]:
        """Return the N pieces of a seed, and the HELD_OUT ones, which are the same for all.

        The first n pieces of a seed are the same for every N >= n. Raises ValueError if the text has too few pieces.
        """
        pieces_PS = self._pieces()[HELD_OUT + self.reserved :]
        if len(pieces_PS) < self.sequences:
            raise ValueError(
                f"{self.text} has {len(pieces_PS):,} different pieces of {self.length} bytes beside the reserved ones, "
                f"expected {self.sequences:,}"
            )
        chosen_N = np.random.default_rng(seed).permutation(len(pieces_PS))[: self.sequences]
        return corpus_of(pieces_PS[chosen_N]), self.held_out()

    def reference_corpora(self) -> tuple[Corpus, Corpus]:
        """Return the reserved pieces and the HELD_OUT ones."""
        return corpus_of(self._pieces()[HELD_OUT : HELD_OUT + self.reserved]), self.held_out()

    def held_out(self) -> Corpus:
        """Return the pieces that no model reads."""
        return corpus_of(self._pieces()[:HELD_OUT])

    def _pieces(self) -> np.ndarray:
        """Return all pieces in an order of their own. Raises ValueError if there are not enough for a reference."""
        pieces_PS = text_pieces(self.text, self.length)
        if len(pieces_PS) <= HELD_OUT + self.reserved:
            raise ValueError(
                f"{self.text} has {len(pieces_PS):,} different pieces of {self.length} bytes, expected more than "
                f"{HELD_OUT:,} held-out and {self.reserved:,} reserved ones"
            )
        return pieces_PS


@functools.lru_cache(maxsize=1)
def text_pieces(source: str, length: int) -> np.ndarray:
    """Return the different pieces of a source as bytes [P, S], in a fixed random order.

    A document is cut into pieces end to end, and its last bytes are left out. A piece that is not ASCII may cut a
    character, so it is left out. Equal pieces count once: a model cannot know which document it read one in.
    """
    cut = [np.frombuffer(text, np.uint8)[: len(text) // length * length] for text in _texts(source)]
    pieces_PS = np.concatenate(cut).reshape(-1, length)
    pieces_PS = np.unique(pieces_PS[(pieces_PS < ASCII).all(axis=1)], axis=0)
    return pieces_PS[np.random.default_rng(0).permutation(len(pieces_PS))]


def _texts(source: str) -> Iterator[bytes]:
    return (document.encode() for document in read_documents([source]))


def corpus_of(pieces_PS: np.ndarray) -> Corpus:
    """Return pieces as documents of S bytes after the byte tokenizer's beginning token."""
    pieces, length = pieces_PS.shape
    beginning = ByteTokenizer().bos_token_id
    tokens_PT = np.full((pieces, length + 1), beginning, np.uint16)
    tokens_PT[:, 1:] = pieces_PS
    return Corpus(
        names=tuple(f"piece {number}" for number in range(pieces)),
        tokens=tokens_PT.ravel(),
        offsets_D=np.arange(pieces + 1, dtype=np.int64) * (length + 1),
        bytes_D=np.full(pieces, length, np.int64),
        learnt=np.ones(tokens_PT.size, bool),
        special=(beginning,),
    )


def documents_of(corpus: Corpus, prefix: str) -> list[Document]:
    """Return the texts of a corpus of pieces."""
    texts = (bytes(corpus.document(d)[1:].astype(np.uint8)).decode() for d in range(len(corpus.names)))
    return [Document(f"{prefix} {name}", text) for name, text in zip(corpus.names, texts, strict=True)]

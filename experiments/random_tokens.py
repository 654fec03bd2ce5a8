"""Documents of uniformly random tokens: a model can learn nothing about them except the tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from loglinear.data.corpus import Corpus

NAME = "random"
BEGINNING = 0  # the first token of every document, which is one of the random tokens too
HELD_OUT = 256  # sequences that validate


class RandomTokens(NamedTuple):
    """The sizes of a dataset: N sequences of S tokens, each drawn uniformly from V tokens."""

    sequences: int
    """N."""
    length: int
    """S, without the beginning token of a document."""
    vocabulary: int
    """V."""

    @property
    def bits(self) -> float:
        """The entropy of the dataset, N S log2 V."""
        return self.sequences * self.length * math.log2(self.vocabulary)

    @property
    def source(self) -> str:
        """The name of the dataset among a recipe's data: random:N:S:V."""
        return f"{NAME}:{self.sequences}:{self.length}:{self.vocabulary}"

    @staticmethod
    def from_source(source: str) -> RandomTokens:
        """Return the sizes in a name random:N:S:V. Raises ValueError for another name, or a number below 1 (V: 2)."""
        name, *numbers = source.split(":")
        if name == NAME and len(numbers) == 3 and all(number.isdecimal() for number in numbers):
            sizes = RandomTokens(*map(int, numbers))
            if min(sizes) >= 1 and sizes.vocabulary >= 2:
                return sizes
        raise ValueError(f"expected random tokens as {NAME}:SEQUENCES:LENGTH:VOCABULARY, got {source!r}")

    def corpora(self, seed: int) -> tuple[Corpus, Corpus]:
        """Return the N sequences of a seed, and HELD_OUT others that validate.

        A document is the beginning token and S random ones, each of one byte: bits per byte are bits a token. The first
        n sequences of a seed are the same for every N >= n.
        """
        held_out = self._replace(sequences=HELD_OUT)
        return self._corpus(np.random.default_rng([seed, 0])), held_out._corpus(np.random.default_rng([seed, 1]))

    def _corpus(self, rng: np.random.Generator) -> Corpus:
        tokens_NS = np.full((self.sequences, self.length + 1), BEGINNING, np.uint32)
        tokens_NS[:, 1:] = rng.integers(self.vocabulary, size=(self.sequences, self.length))
        return Corpus(
            names=tuple(f"sequence {number}" for number in range(self.sequences)),
            tokens=tokens_NS.ravel(),
            offsets_D=np.arange(self.sequences + 1, dtype=np.int64) * (self.length + 1),
            bytes_D=np.full(self.sequences, self.length + 1, np.int64),
            learnt=np.ones(tokens_NS.size, bool),
            special=(),
        )

"""The states of sequences that begin other sequences: a repeated prefix costs a copy."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from loglinear.models import LogLinearCache

FEWEST_SHARED = 64  # tokens that two prompts share beyond a stored prefix before it is worth a state of its own


class Prefix(NamedTuple):
    """A stored sequence. Nobody may change its cache."""

    tokens: np.ndarray
    cache: LogLinearCache

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.cache.nbytes


class PrefixCache:
    """States of sequences, found by their tokens. The least recently used ones leave first.

    A state of linear layers has the same size after any number of tokens: a long prefix costs as much as a short one.

    Args:
        most_bytes: The most bytes of all states. 0: nothing is stored.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.nbytes = most_bytes, 0
        self._stored: OrderedDict[bytes, Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._stored)

    def find(self, tokens: np.ndarray) -> tuple[Prefix | None, int]:
        """Return the longest stored beginning of these tokens, and how many tokens any stored sequence shares."""
        best, shared = None, 0
        for key, prefix in self._stored.items():
            common = _common(prefix.tokens, tokens)
            shared = max(shared, common)
            if common == len(prefix.tokens) and (best is None or common > len(self._stored[best].tokens)):
                best = key
        if best is None:
            return None, shared
        self._stored.move_to_end(best)
        return self._stored[best], shared

    def store(self, tokens: np.ndarray, cache: LogLinearCache) -> None:
        """Keep the state after these tokens, as long as there is room for it. The cache must not change afterwards."""
        prefix, key = Prefix(tokens, cache), hashlib.sha256(tokens.tobytes()).digest()
        if prefix.nbytes > self.most_bytes or len(tokens) == 0:
            return
        if key in self._stored:
            self._stored.move_to_end(key)
            return
        self._stored[key] = prefix
        self.nbytes += prefix.nbytes
        while self.nbytes > self.most_bytes:
            self.nbytes -= self._stored.popitem(last=False)[1].nbytes


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """Return how many tokens two sequences share from their beginning."""
    size = min(len(first), len(second))
    differs = first[:size] != second[:size]
    return int(differs.argmax()) if differs.any() else size

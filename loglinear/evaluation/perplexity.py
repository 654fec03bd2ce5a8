"""Validation loss: bits per byte with their standard error over documents, and the loss at each position.

Bits per byte are the nats of all predicted tokens, divided by the bytes of their text (`Corpus.token_bytes`) and by
ln 2. The first token of a window is context: it is not predicted, and its bytes do not count. The end of a document is
predicted and has no bytes.

# D documents, N windows, P position bins, T positions
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from loglinear.data.corpus import Corpus
from loglinear.data.packing import IGNORED, pieces_by_rounds
from loglinear.evaluation.packed import LOGIT_ROWS, logits_of, read, rows

FIRST_BIN = 16  # positions of the first bin of a curve over positions


@dataclass(frozen=True)
class Perplexity:
    """The loss of a model on a text, in nats per document, so that two models can be compared document by document."""

    names: tuple[str, ...]
    nats_D: np.ndarray  # sum over the predicted tokens of each document
    tokens_D: np.ndarray  # predicted tokens of each document
    bytes_D: np.ndarray  # bytes of text of these tokens
    length: int  # tokens of the longest window
    nats_NT: np.ndarray  # [windows of `length` tokens, length - 1]: token t + 1 after tokens 0..t
    bytes_NT: np.ndarray  # bytes of each of these tokens
    documents_N: np.ndarray  # the document of each of these windows, an index into names

    @property
    def bits_per_byte(self) -> float:
        """The cross-entropy per byte of text."""
        return _bits(self.nats_D.sum() / self.bytes_D.sum())

    def __str__(self) -> str:
        error = "unknown" if math.isnan(self.standard_error) else f"{self.standard_error:.4f}"
        return f"{self.bits_per_byte:.4f} ± {error}"

    @property
    def loss(self) -> float:
        """The nats per token. Their exponential is the perplexity."""
        return float(self.nats_D.sum() / self.tokens_D.sum())

    @property
    def standard_error(self) -> float:
        """The standard error of bits_per_byte over documents, because tokens of one document are not independent."""
        return _bits(_ratio_error(self.nats_D, self.bytes_D))

    def difference(self, other: Perplexity) -> tuple[float, float]:
        """Return this model's bits_per_byte minus the other's on the same text, and the standard error.

        The difference is paired by document, which removes the difficulty that both models share.

        Raises ValueError for results of different texts.
        """
        if self.names != other.names or not np.array_equal(self.tokens_D, other.tokens_D):
            raise ValueError("the two results are of different texts, expected the same documents and lengths")
        error = _bits(_ratio_error(self.nats_D - other.nats_D, self.bytes_D))
        return self.bits_per_byte - other.bits_per_byte, error

    def by_position(self) -> dict[str, list[float]]:
        """Return bits per byte in bins of positions that widen by sqrt(2), over windows of full length only.

        Every bin averages the same windows, so the curve compares positions and not texts. Its standard error is over
        their documents. The curve is empty if no document has `length` tokens.
        """
        edges_P = self._edges()
        nats_DP, bytes_DP = self._sums_DP(self.nats_NT, edges_P), self._sums_DP(self.bytes_NT, edges_P)
        with np.errstate(invalid="ignore", divide="ignore"):  # a bin with only ends of documents has no bytes
            means_P = nats_DP.sum(0) / bytes_DP.sum(0)
        errors_P = [_ratio_error(nats_D, bytes_D) for nats_D, bytes_D in zip(nats_DP.T, bytes_DP.T, strict=True)]
        return {
            "position": _middles(edges_P),
            "bits_per_byte": [_bits(mean) for mean in means_P],
            "standard_error": [_bits(error) for error in errors_P],
        }

    def by_document(self, width: int) -> dict[str, list[Any]]:
        """Return bits per byte in bins of `width` positions for each document with full windows, to pair two models.

        "bits_per_byte" has a row for each of "documents", rounded to 1e-4. It is NaN for a bin without bytes.
        """
        edges_P = self._edges(width)
        nats_DP, bytes_DP = self._sums_DP(self.nats_NT, edges_P), self._sums_DP(self.bytes_NT, edges_P)
        with np.errstate(invalid="ignore", divide="ignore"):
            bits_DP = nats_DP / bytes_DP / math.log(2)
        return {
            "documents": [self.names[d] for d in np.unique(self.documents_N)],
            "position": _middles(edges_P),
            "bits_per_byte": bits_DP.round(4).tolist(),
        }

    def _edges(self, width: int | None = None) -> np.ndarray:
        """Return the first positions of the bins and the end of the last. Without full windows there is no bin."""
        windows, positions = self.nats_NT.shape
        if windows == 0:
            return np.zeros(1, dtype=np.int64)
        if width is not None:
            return np.unique([*range(0, positions, width), positions])
        doublings = max(0.0, math.log2(positions / FIRST_BIN))
        edges = [FIRST_BIN * 2 ** (step / 2) for step in range(math.ceil(2 * doublings))]
        return np.unique([0, *(round(edge) for edge in edges), positions])

    def _sums_DP(self, values_NT: np.ndarray, edges_P: np.ndarray) -> np.ndarray:
        """Return the sums [documents with full windows, bins] of values of windows and positions."""
        documents, rows_N = np.unique(self.documents_N, return_inverse=True)
        sums_DP = np.zeros((len(documents), len(edges_P) - 1))
        if len(documents) == 0:
            return sums_DP
        np.add.at(sums_DP, rows_N, np.add.reduceat(values_NT, edges_P[:-1], axis=1))
        return sums_DP

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as plain JSON types."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "standard_error": self.standard_error,
            "loss": self.loss,
            "perplexity": math.exp(self.loss),
            "tokens": int(self.tokens_D.sum()),
            "documents": len(self.names),
            "length": self.length,
            "full_windows": len(self.nats_NT),
            "by_position": self.by_position(),
        }


def _middles(edges_P: np.ndarray) -> list[float]:
    return [float(low + high + 1) / 2 for low, high in itertools.pairwise(edges_P)]


def _bits(nats: float) -> float:
    return float(nats) / math.log(2)


def _ratio_error(sums_D: np.ndarray, counts_D: np.ndarray) -> float:
    """Return the standard error of sums.sum() / counts.sum() over independent documents (linearised estimator)."""
    documents = len(sums_D)
    if documents < 2 or counts_D.sum() == 0:
        return math.nan
    residuals_D = sums_D - sums_D.sum() / counts_D.sum() * counts_D
    return math.sqrt(documents / (documents - 1) * float((residuals_D**2).sum())) / float(counts_D.sum())


def evaluate_perplexity(
    model: Any, corpus: Corpus, *, length: int, max_tokens: int, row_tokens: int | None = None, progress: bool = True
) -> Perplexity:
    """Return the loss on about `max_tokens` tokens of a corpus, in windows of at most `length` tokens.

    Every window begins with an empty state. The first windows of all documents come before any second window, so a
    small `max_tokens` still covers many documents. A forward pass reads `row_tokens` (default: 4 windows).

    Raises ValueError if no token of text has a token before it.
    """
    windows = _windows(corpus, length, max_tokens)
    if not any(corpus.token_bytes(start + 1, end).any() for _, start, end in windows):
        raise ValueError("the text has no document of two tokens or more, so there is nothing to predict")
    nats_D, bytes_D = np.zeros(len(corpus.names)), np.zeros(len(corpus.names))
    tokens_D = np.zeros(len(corpus.names), dtype=np.int64)
    full: list[tuple[int, np.ndarray, np.ndarray]] = []  # document, nats_T, bytes_T
    total = sum(end - start for _, start, end in windows)
    with tqdm(total=total, desc="evaluating", unit="tok", unit_scale=True, disable=not progress, leave=False) as bar:
        for row in rows(windows, _size, row_tokens or 4 * length):
            losses = token_losses(model, [corpus.tokens[start:end] for _, start, end in row])
            for (d, start, end), nats_T in zip(row, losses, strict=True):
                bytes_T = corpus.token_bytes(start + 1, end)
                nats_D[d] += nats_T.sum()
                bytes_D[d] += bytes_T.sum()
                tokens_D[d] += len(nats_T)
                if end - start == length:
                    full.append((d, nats_T, bytes_T))
                bar.update(end - start)
    seen = np.flatnonzero(tokens_D)
    return Perplexity(
        names=tuple(corpus.names[d] for d in seen),
        nats_D=nats_D[seen],
        tokens_D=tokens_D[seen],
        bytes_D=bytes_D[seen],
        length=length,
        nats_NT=np.array([nats_T for _, nats_T, _ in full]).reshape(-1, length - 1),
        bytes_NT=np.array([bytes_T for _, _, bytes_T in full]).reshape(-1, length - 1),
        documents_N=np.searchsorted(seen, np.array([d for d, _, _ in full], dtype=np.int64)),
    )


def _windows(corpus: Corpus, length: int, max_tokens: int) -> list[tuple[int, int, int]]:
    """Return (document, start, end) of windows, first windows first, until they have max_tokens."""
    chosen, total = [], 0
    for start, end in pieces_by_rounds(corpus, length).tolist():
        if end - start >= 2 and total < max_tokens:
            chosen.append((int(corpus.document_of(start)), start, end))
            total += end - start
    return chosen


def _size(window: tuple[int, int, int]) -> int:
    _, start, end = window
    return end - start


@torch.no_grad()
def token_losses(model: Any, sequences: list[np.ndarray]) -> list[np.ndarray]:
    """Return the nats of every token but the first of each sequence, as float64, from one packed forward pass."""
    hidden, labels = read(model, sequences)
    losses = [
        F.cross_entropy(logits_of(model, part), targets, ignore_index=IGNORED, reduction="none")
        for part, targets in zip(hidden.split(LOGIT_ROWS), labels.split(LOGIT_ROWS), strict=True)
    ]
    kept = torch.cat(losses)[labels != IGNORED].double().cpu().numpy()
    return np.split(kept, np.cumsum([len(sequence) - 1 for sequence in sequences])[:-1])

"""Loss of the same text with far text given and with it withheld.

A window has W tokens. Its second half is predicted several times, each time from at most C tokens before each target,
for several contexts C up to W. Token t of the window is predicted from tokens s_C(t) .. t - 1 with

    s_C(t) = floor(2 t / C) C / 2 - C / 2,    so that    C / 2 <= t - s_C(t) < C

A context is therefore a number of windows of C tokens, which begin every C / 2 tokens and predict their second halves.
All contexts together read as many windows of W tokens as there are contexts.

# D documents, N windows, W tokens of a window, C contexts, P bins of positions
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from loglinear.data.corpus import Corpus
from loglinear.evaluation.packed import rows
from loglinear.evaluation.perplexity import token_losses

WINDOWS = 2  # in each document
BINS = 8  # in which the positions of the targets are averaged
ROW_WINDOWS = 4  # windows of W tokens that a forward pass reads


def losses_by_context(
    model: Any, windows_NW: Sequence[np.ndarray], contexts: Sequence[int], *, row_tokens: int, progress: bool = False
) -> np.ndarray:
    """Return the nats of the second half of every window for each context, [C, N, W / 2] in float64.

    Each of `contexts` is even and divides W. A forward pass reads up to `row_tokens` tokens, or one sequence if that is
    longer.

    Raises ValueError for other contexts, and for windows of different lengths.
    """
    window = len(windows_NW[0])
    if any(len(tokens) != window for tokens in windows_NW):
        raise ValueError(f"windows must all have {window:,} tokens")
    for context in contexts:
        if context < 2 or context % 2 or window % context:
            raise ValueError(f"a context must be even and divide the window of {window:,} tokens, got {context:,}")
    nats_CNT = np.empty((len(contexts), len(windows_NW), window // 2))
    with tqdm(
        total=nats_CNT.size * 2, desc="contexts", unit="tok", unit_scale=True, disable=not progress, leave=False
    ) as bar:
        for nats_NT, context in zip(nats_CNT, contexts, strict=True):
            half = context // 2
            starts = [(n, start) for n in range(len(windows_NW)) for start in range(window // 2, window, half)]
            for row in rows(starts, lambda _, size=context: size, row_tokens):  # type: ignore[misc]
                losses = token_losses(model, [windows_NW[n][start - half : start + half] for n, start in row])
                for (n, start), nats_T in zip(row, losses, strict=True):
                    place = start - window // 2
                    nats_NT[n, place : place + half] = nats_T[-half:]
                bar.update(len(row) * context)
    return nats_CNT


def evaluate_contexts(model: Any, corpus: Corpus, contexts: Sequence[int], *, progress: bool = True) -> dict[str, Any]:
    """Return the bits per byte of the same text for each context, as plain JSON types.

    A window is as long as the longest context. Each document gives WINDOWS of them, evenly spaced from its beginning to
    its end. "bits_per_byte" is the mean over all targets, and "by_document" has the mean of each of "documents".
    "by_position" has the mean of each bin of positions. "position" has the middles of the bins in the window.

    Raises ValueError if a document is shorter than the longest context.
    """
    window = max(contexts)
    lengths_D = np.diff(corpus.offsets_D)
    if len(lengths_D) == 0 or lengths_D.min() < window:
        raise ValueError(f"every document must have {window:,} tokens, the longest context")
    firsts_DN = np.linspace(corpus.offsets_D[:-1], corpus.offsets_D[1:] - window, WINDOWS, axis=1).astype(np.int64)
    firsts_N, documents = firsts_DN.ravel().tolist(), len(lengths_D)
    windows_NW = [corpus.tokens[first : first + window] for first in firsts_N]
    bytes_NT = np.stack([corpus.token_bytes(first + window // 2, first + window) for first in firsts_N])
    nats_CNT = losses_by_context(model, windows_NW, contexts, row_tokens=ROW_WINDOWS * window, progress=progress)
    edges_P = np.unique(np.linspace(0, window // 2, BINS + 1).astype(np.int64))
    found = {}
    for context, nats_NT in zip(contexts, nats_CNT, strict=True):
        nats_D, bytes_D = (values_NT.reshape(documents, -1).sum(1) for values_NT in (nats_NT, bytes_NT))
        nats_P, bytes_P = (np.add.reduceat(values_NT.sum(0), edges_P[:-1]) for values_NT in (nats_NT, bytes_NT))
        found[str(context)] = {
            "bits_per_byte": float(_bits(nats_D.sum(), bytes_D.sum())),
            "by_document": _bits(nats_D, bytes_D).round(5).tolist(),
            "by_position": _bits(nats_P, bytes_P).round(5).tolist(),
        }
    middles_P = window // 2 + (edges_P[:-1] + edges_P[1:]) / 2
    return {
        "targets": int(nats_CNT[0].size),
        "position": middles_P.tolist(),
        "documents": list(corpus.names),
        "contexts": found,
    }


def _bits(nats: Any, size: Any) -> Any:
    return nats / size / math.log(2)

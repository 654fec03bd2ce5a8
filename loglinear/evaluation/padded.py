"""Padded forward passes over many sequences, for any causal language model of transformers.

Packed rows (`loglinear.evaluation.packed`) need a model that knows the boundaries of sequences. Padding needs none: it
lies behind the tokens, where no token of a causal model reads it.

# B sequences of a batch, T tokens of the longest
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from loglinear.evaluation.packed import LOGIT_ROWS

BATCH_TOKENS = 8192  # of one forward pass with its padding, or one sequence where that is longer


def padded(sequences: Sequence[np.ndarray], device: Any, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Return sequences as rows of token ids, with padding behind the tokens or to their left, and its mask, 1 or 0."""
    longest = max(map(len, sequences))
    ids_BT = np.zeros((len(sequences), longest), dtype=np.int64)  # any token may stand where the mask is zero
    mask_BT = np.zeros_like(ids_BT)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), longest) if left else slice(0, len(sequence))
        ids_BT[row, place], mask_BT[row, place] = sequence, 1
    return torch.from_numpy(ids_BT).to(device), torch.from_numpy(mask_BT).to(device)


def padded_losses(
    model: Any, sequences: Sequence[np.ndarray], *, batch_tokens: int = BATCH_TOKENS, label: str | None = None
) -> list[np.ndarray]:
    """Return the nats -ln p(x_t | x_<t) of every token but the first of each sequence, as float64.

    The softmax is in at least float32. `batch_tokens` bounds a forward pass, and the result does not depend on it.
    `label` names the progress bar; None means no bar.
    """
    losses: dict[int, np.ndarray] = {}
    total = sum(map(len, sequences))
    with tqdm(total=total, desc=label, unit="tok", unit_scale=True, disable=label is None, leave=False) as bar:
        for batch in _batches([len(sequence) for sequence in sequences], batch_tokens):
            chosen = [sequences[index] for index in batch]
            losses.update(zip(batch, _batch_losses(model, chosen), strict=True))
            bar.update(sum(map(len, chosen)))
    return [losses[index] for index in range(len(sequences))]


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield batches of sequences of similar lengths, by their indices, which fit into `batch_tokens` with padding."""
    batch: list[int] = []
    for index in np.argsort(lengths, kind="stable").tolist():  # the last sequence of a batch is its longest
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def _batch_losses(model: Any, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the nats of every token but the first of each sequence, from one forward pass."""
    ids, mask = padded(sequences, model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    at_least_float32 = torch.promote_types(logits.dtype, torch.float32)
    losses = []
    for row, sequence in enumerate(sequences):
        end = len(sequence)
        parts = zip(logits[row, : end - 1].split(LOGIT_ROWS), ids[row, 1:end].split(LOGIT_ROWS), strict=True)
        nats = [F.cross_entropy(part.to(at_least_float32), targets, reduction="none") for part, targets in parts]
        losses.append(torch.cat(nats).double().cpu().numpy())
    return losses

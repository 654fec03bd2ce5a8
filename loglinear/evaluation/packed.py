"""Packed forward passes over many sequences, for every evaluation with teacher forcing.

# R tokens of a row, D hidden size
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from loglinear.data.packing import pack

LOGIT_ROWS = 2048  # positions whose logits exist at once
Item = TypeVar("Item")


def rows(items: Iterable[Item], size: Callable[[Item], int], row_tokens: int) -> Iterator[list[Item]]:
    """Yield rows of consecutive items that fit into `row_tokens`. A longer item is a row of its own."""
    row: list[Item] = []
    used = 0
    for item in items:
        if row and used + size(item) > row_tokens:
            yield row
            row, used = [], 0
        row.append(item)
        used += size(item)
    if row:
        yield row


@torch.no_grad()
def read(model: Any, sequences: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return hidden states [R - 1, D] of sequences from one forward pass, and the target [R - 1] of each.

    The target across a boundary of sequences is IGNORED.
    """
    row = {name: tensor.to(model.device) for name, tensor in pack(sequences).items()}
    labels: Tensor = row.pop("labels")
    return model.base_model(**row, use_cache=False).last_hidden_state[0, :-1], labels[0, 1:]


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Return the logits [n, V] of hidden states [n, D], in at least float32, with the factor of the model's family."""
    head, config = model.get_output_embeddings(), model.config
    # Granite divides its logits, Falcon-H1 multiplies them, both outside the head.
    factor = getattr(config, "lm_head_multiplier", 1.0) / getattr(config, "logits_scaling", 1.0)
    logits = head(hidden.to(head.weight.dtype))
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) * factor

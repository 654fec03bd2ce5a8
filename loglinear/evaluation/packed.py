"""Reading many sequences in packed forward passes: what every teacher-forced evaluation does.

# R tokens of a row, D hidden size
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from loglinear.training.data import pack

LOGIT_ROWS = 2048  # positions whose logits exist at once
Item = TypeVar("Item")


def rows(items: Iterable[Item], size: Callable[[Item], int], row_tokens: int) -> Iterator[list[Item]]:
    """Items in their order, together as long as they fit into `row_tokens`; a longer one is a row of its own."""
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
    """(hidden states [R - 1, D], the token [R - 1] that each is to predict) of sequences read in one forward pass.

    Across a boundary the token is IGNORED.
    """
    row = {name: tensor.to(model.device) for name, tensor in pack(sequences).items()}
    labels: Tensor = row.pop("labels")
    return model.base_model(**row, use_cache=False).last_hidden_state[0, :-1], labels[0, 1:]

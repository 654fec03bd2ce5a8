"""Multi-query associative recall: pairs of keys and values, then the keys again as queries for their values.

The task is that of Arora, Eyuboglu, Timalsina, Johnson, Poli, Zou, Rudra, Ré, "Zoology", arXiv 2312.04927, appendix E,
as its authors generate it. A sequence of T tokens begins with P pairs k_1 v_1 ... k_P v_P. Then follow (T - 2 P) / 2
slots of two tokens. P of the slots begin with a key. They are drawn one after the other without replacement, with
probabilities proportional to

    alpha x^(alpha - 1),    x = 1 ... (T - 2 P) / 2

The first drawn slot has k_1, the second k_2 and so on. All other tokens are drawn uniformly from the vocabulary. Keys
are different tokens of its lower half without 0, values are different tokens of its upper half.

With `starts` the sequences also have random positions of the tree at which they start. The tokens are the same.
"""

# N examples, P pairs, T tokens
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loglinear.data.packing import IGNORED

ROWS = 4096  # examples whose random numbers exist at once


class Recall(NamedTuple):
    """Examples as tokens and labels of a language model."""

    tokens_NT: Tensor
    labels_NT: Tensor  # the value at the position after a query, IGNORED elsewhere
    starts_N: Tensor | None = None  # the position of the tree at which each sequence starts; None: 0


def recall_examples(
    examples: int,
    *,
    length: int,
    pairs: int,
    seed: int,
    vocab_size: int = 8192,
    alpha: float = 0.01,
    starts: int = 1,
) -> Recall:
    """Return examples of one length and one number of pairs. Equal arguments give equal examples.

    Each sequence starts at a position of the tree that is drawn uniformly from 0 to `starts` - 1.

    Raises ValueError unless the length is even and at least four times the pairs, and each half of the vocabulary has
    more tokens than there are pairs.
    """
    if length % 2 or length < 4 * pairs:
        raise ValueError(f"length must be even and at least 4 times the {pairs} pairs, got {length}")
    if vocab_size // 2 <= pairs:
        raise ValueError(f"vocab_size must be more than twice the {pairs} pairs, got {vocab_size}")
    generator = torch.Generator().manual_seed(seed)
    firsts = range(0, examples, ROWS)
    parts = [_examples(min(ROWS, examples - first), length, pairs, vocab_size, alpha, generator) for first in firsts]
    starts_N = torch.randint(starts, (examples,), generator=generator) if starts > 1 else None
    return Recall(torch.cat([tokens for tokens, _ in parts]), torch.cat([labels for _, labels in parts]), starts_N)


def _examples(
    N: int, T: int, P: int, vocab_size: int, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    half, slots = vocab_size // 2, (T - 2 * P) // 2

    def distinct(count: int) -> Tensor:
        """Return P different numbers below count for each example, in random order."""
        return torch.rand(N, count, generator=generator).topk(P).indices

    keys, values = 1 + distinct(half - 1), half + distinct(vocab_size - half)
    # The order of log p + Gumbel noise is that of draws without replacement (Plackett-Luce).
    log_p = (alpha - 1) * torch.arange(1, slots + 1, dtype=torch.float64).log()
    uniform = torch.rand(N, slots, generator=generator, dtype=torch.float64).clamp(min=1e-300)
    query = 2 * P + 2 * (log_p - (-uniform.log()).log()).topk(P).indices

    tokens = torch.randint(vocab_size, (N, T), generator=generator)
    tokens[:, 0 : 2 * P : 2], tokens[:, 1 : 2 * P : 2] = keys, values
    tokens.scatter_(1, query, keys)
    labels = torch.full((N, T), IGNORED).scatter_(1, query + 1, values)
    return tokens, labels

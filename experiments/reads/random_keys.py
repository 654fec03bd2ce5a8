"""The share of random queries whose own bucket has the highest Gram score.

python -m experiments.reads.random_keys
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

BUCKETS, TRIALS = 16, 400


def share_found(key_dim: int, tokens: int, *, trials: int = TRIALS, seed: int = 0) -> float:
    """Return the share of trials in which the bucket with the query's own key scores highest.

    Each of BUCKETS buckets holds `tokens` random keys of length 1; the query equals one key of the first bucket. The
    score is sum_s (q . k_s)^2, of buckets of one size.
    """
    generator = torch.Generator().manual_seed(seed)
    found = 0
    for _ in range(trials):
        keys = F.normalize(torch.randn(BUCKETS, tokens, key_dim, generator=generator), dim=-1)
        scores = (keys @ keys[0, 0]).square().sum(1)
        found += int(scores.argmax() == 0)
    return found / trials


def main() -> None:
    """Print the table: rows are key dimensions, columns tokens of a bucket as multiples of the key dimension."""
    multiples = (1, 2, 4, 8, 16)
    print("K", *(f"{multiple} K" for multiple in multiples), sep="\t")
    for key_dim in (16, 64, 128):
        print(key_dim, *(f"{share_found(key_dim, multiple * key_dim):.0%}" for multiple in multiples), sep="\t")


if __name__ == "__main__":
    main()

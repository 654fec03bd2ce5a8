"""The share of random queries whose own bucket has the highest Gram score.

python -m experiments.reads.random_keys
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from torch.nn import functional as F

from loglinear.cli import execute
from loglinear.cli.options import COUNT, SEED

BUCKETS, TRIALS = 16, 400
KEY_DIMS, MULTIPLES = (16, 64, 128), (1, 2, 4, 8, 16)

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)


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


@app.command()
def main(
    trials: Annotated[int, typer.Option(help="Queries for each number of the table.", **COUNT)] = TRIALS,
    seed: Annotated[int, typer.Option(help="Seed of the keys.", **SEED)] = 0,
) -> None:
    """Print the table: rows are key dimensions, columns tokens of a bucket as multiples of the key dimension."""
    print("K", *(f"{multiple} K" for multiple in MULTIPLES), sep="\t")
    for key_dim in KEY_DIMS:
        shares = (share_found(key_dim, multiple * key_dim, trials=trials, seed=seed) for multiple in MULTIPLES)
        print(key_dim, *(f"{share:.0%}" for share in shares), sep="\t")


if __name__ == "__main__":
    execute(app, "python -m experiments.reads.random_keys")

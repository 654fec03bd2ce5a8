"""A candidate: the partition of the past, the score of a bucket, and the form of the weights."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loglinear.partition import Partition

SCORES = ("none", "keys", "qk", "gram", "energy", "absorbed")
"""The score of a bucket with tokens s, for the query of token t.

k' and q' have a projection and a convolution of their own.

    none       0: the weights depend on x_t alone
    keys       sum_s q'_t . k'_s / sqrt(n), q' and k' of unit length
    qk         sum_s q_t . k_s / sqrt(n), the operator's own q and k, of unit length
    gram       sum_s (q_t . k_s)^2 - n / K, the operator's own q and k, of unit length
    energy     log(|R|^2 + 1e-4) / 8, R the read of the bucket
    absorbed   |q_t|^2 - |P^T q_t|^2, P the bucket's transition without decay (delta rule; q of unit length)
"""
OPTIONS = ("residual", "eta", "unerased", "late")


@dataclass(frozen=True)
class Read:
    """One candidate. Its name is `r16-f16-keys` or similar, followed by its options.

    One bucket holds the tokens of the own block of `finest` tokens, up to the token itself. Older blocks form a tree of
    this radix. The buckets have weights n_t softmax(a) of mean one. Options:

        residual   the linear read plus rho_t times a softmax over the buckets and a null route; the second term reads
                   the state at a bucket's end with q_t itself, without decay and erasure by nearer buckets
        eta        the decay between buckets has an exponent for each head, 1, 1/2, 1/4, 0, 1 ... at the start
        unerased   far buckets are read with q_t itself, not with its remains after nearer buckets (delta rule)
        late       tau starts at 0, where the model is the linear model, instead of at 1

    Raises ValueError for an unknown score, or for a size that is not a power of two.
    """

    radix: int = 16
    finest: int = 16
    score: str = "keys"
    residual: bool = False
    eta: bool = False
    unerased: bool = False
    late: bool = False

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {self.score!r}")
        Partition(self.radix, self.finest)  # checks both

    @property
    def name(self) -> str:
        """The name from which `parse` makes the same candidate."""
        options = [option for option in OPTIONS if getattr(self, option)]
        return "-".join([f"r{self.radix}", f"f{self.finest}", self.score, *options])

    @classmethod
    def parse(cls, name: str) -> Read:
        """Return the candidate of a name; ValueError if the name has another form."""
        match = re.fullmatch(rf"r(\d+)-f(\d+)-([a-z]+)((?:-(?:{'|'.join(OPTIONS)}))*)", name)
        if match is None:
            raise ValueError(f"a read is named like r16-f16-keys or r4-f16-gram-eta, got {name!r}")
        options = {option: True for option in match[4].split("-") if option}
        return cls(int(match[1]), int(match[2]), match[3], **options)

    @property
    def partition(self) -> Partition:
        """The partition of the past. Its columns are the buckets."""
        return Partition(self.radix, self.finest)

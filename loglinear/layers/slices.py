# B batch, T time, C channels, W kernel, S sequences, G key/value heads, K head width, n tokens of this part
"""The part of long sequences that one of several devices holds, as layers and models see it."""

from typing import Any, Protocol

from torch import Tensor

from loglinear.ops import BucketScores


class Slice(Protocol):
    """One device's part of sequences that lie on several devices; `loglinear.parallel.Slices` is one."""

    @property
    def cu_seqlens(self) -> Tensor | None:
        """[S+1] Boundaries of the documents in this part; None: not packed."""

    @property
    def position(self) -> int:
        """The position of this part's first token in its document or row."""

    def check_time(self, name: str, x: Tensor, dim: int = 1) -> None:
        """Raise ValueError unless x has the places of this part."""

    def inputs_before(self, x: Tensor, kernel: int, boundaries: Tensor | None) -> Tensor | None:
        """Return the state [S, W-1, C] of a convolution over this part's inputs x [B, T, C]; None for one tap.

        Raises ValueError unless x is packed (boundaries [S+1]) as this part is; None: not packed.
        """

    def attend(self, transition: str, tensors: list[Tensor | None], weights: Tensor, **options: Any) -> Tensor:
        """Return the output of the operator of a transition for this part's tokens."""

    def scores(self, q: Tensor, k: Tensor, **options: Any) -> BucketScores:
        """Return the scores of buckets for this part's tokens."""

    def with_older_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, G, position + n, K]: the older ones of the document that this part continues.

        This part's own k and v [B, G, n, K] come last.
        """

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of x over all devices; the mean of their gradients is the gradient of the sum."""

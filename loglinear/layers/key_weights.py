# B batch, T time, D hidden size, G query/key groups, K key, L columns
"""The weight of every key in the scores of buckets: tokens that no query will ask for need not count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loglinear.layers.level_scales import ZeroLinear
from loglinear.ops.problem import UNIT_EPSILON
from loglinear.ops.scores import without_own
from loglinear.variants.base import at_least_float32

START = 2.0  # of the logit: every key begins with the weight sigmoid(2) = 0.88
PADDING = 16  # further numbers of a key: the kernels take multiples of 16


class KeyWeights(nn.Module):
    """The weight p [B, T, G] of each token's key in the scores, and the scores with it.

        p_s          = sigmoid(W x_s + bias + 2)
        score(t, b)  = sum over the tokens s of bucket b of p_s ((q_t . k_s)^2 - 1 / K),    q and k of length 1

    With every p at 1 it is the score of `loglinear.ops.bucket_scores`. The layer `proj` holds W [G, D] and the bias
    [G], which start at zero. So all keys begin with one weight.

    `bucket_scores` takes keys of length 1. Here a token has two of them. The product of (sqrt(p) k, sqrt(1 - p)) with
    (q, 0) is sqrt(p) q . k. The product of (sqrt(p), sqrt(1 - p)) with (1, 0) is sqrt(p), so its squares give the sum
    of p. Both are groups of one call, which therefore costs twice that of equal keys.

    Args:
        hidden_size: D.
        num_groups: G.
        key_dim: K.
    """

    def __init__(self, hidden_size: int, num_groups: int, key_dim: int) -> None:
        super().__init__()
        self.groups, self.key_dim = num_groups, key_dim
        self.proj = ZeroLinear(hidden_size, num_groups)

    @property
    def sums(self) -> dict[str, Any]:
        """The groups and the key dimension of the call of `bucket_scores`."""
        return {"groups": 2 * self.groups, "key_dim": self.key_dim + PADDING}

    def operands(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries and keys [B, T, 2 G, K + PADDING] of the call, for x [B, T, D], q and k [B, T, G, K]."""
        logits = at_least_float32(self.proj(x)).unsqueeze(-1) + START
        root, rest = (torch.exp(0.5 * F.logsigmoid(sign * logits)) for sign in (1, -1))  # of p and of 1 - p
        (q1, q_rest), (k1, k_rest) = _of_length_1(q), _of_length_1(k)
        zero, one = torch.zeros_like(root), torch.ones_like(root)
        first = self.key_dim - 1  # F.pad fills up to the K numbers of a key
        keys = torch.cat([root * k1, rest, root * k_rest, zero], -1), torch.cat([F.pad(root, (0, first)), rest], -1)
        queries = torch.cat([q1, zero, zero, q_rest], -1), F.pad(one, (0, first))
        asked, held = (
            torch.cat([F.pad(x, (0, self.key_dim + PADDING - x.shape[-1])) for x in both], 2)
            for both in (queries, keys)
        )
        return asked.to(q.dtype), held.to(k.dtype)

    def scores(self, found: Tensor, tokens: Tensor) -> Tensor:
        """Return the scores [B, T, G, L] from those of the call, [B, T, 2 G, L], with its tokens [B or 1, T, L]."""
        means = without_own(tokens).to(found.dtype) / (self.key_dim + PADDING)  # what the call takes off
        # The call scales a vector of length 1 by 1 / sqrt(1 + epsilon), and a score holds four of them.
        match, mass = ((1 + UNIT_EPSILON) ** 2 * (found + means.unsqueeze(2))).split(self.groups, 2)
        return match - mass / self.key_dim


def _of_length_1(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `unit_length` of x in at least float32, and the number [..., 1] that makes its length exactly 1."""
    wide = at_least_float32(x)
    factor = torch.rsqrt(wide.square().sum(-1, keepdim=True) + UNIT_EPSILON)
    return wide * factor, UNIT_EPSILON**0.5 * factor

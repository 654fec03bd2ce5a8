# B batch, T time, D hidden size, G query/key groups, H heads, L columns
"""The layer of the routed read: weights of buckets, from the hidden states and from the buckets' scores."""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from loglinear.layers.key_weights import KeyWeights
from loglinear.layers.level_scales import ZeroLinear
from loglinear.ops import routed_weights
from loglinear.variants.base import HeadBias, HeadSizes

Score = Literal["gram", "selective_gram"]
SHARPNESS = 4.0  # factor of tau, which then learns as fast as with a learning rate that many times as large


class Routing(NamedTuple):
    """The choices of a routed read.

    `checked` raises ValueError for an unknown score, for a tau that is negative or not finite, or for a top_k below 1.
    """

    score: str = "gram"
    """The score of a bucket: "gram" is that of `loglinear.ops.bucket_scores`, "selective_gram" that of `KeyWeights`."""
    tau: float = 1.0
    """The value of tau, the factor of the score, at the start. 0: the model starts as the linear model.

    It is not negative, because such a tau prefers the buckets that match worst. Training may learn one.
    """
    top_k: int | None = None
    """The buckets that a decode step reads in each head, besides the token's own; see `keep_largest`. None: all."""

    def checked(self) -> "Routing":
        """Return the same choices; ValueError if one is not allowed."""
        if self.score not in get_args(Score):
            raise ValueError(f"routing must be one of {', '.join(get_args(Score))} or None, got {self.score!r}")
        tau: Any = self.tau
        if isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 <= tau < math.inf:
            raise ValueError(f"routing_tau must be a finite number of at least 0, got {tau!r}")
        check_top_k(self.top_k)
        return self


def check_top_k(top_k: Any) -> None:
    """Raise ValueError unless `top_k` is None or an integer of at least 1."""
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"decode_top_k must be an integer of at least 1 or None, got {top_k!r}")


def keep_largest(weights: Tensor, top_k: int | None) -> Tensor:
    """Return the weights [..., L] with 0 in place of all but column 0 and the `top_k` largest others.

    Column 0 is the token's own finest block. Its tokens lie in a step's buffer, so it costs no read of a state. The
    nearer bucket wins a tie. The weights that stay are not scaled up, so the output lacks the other buckets' reads and
    nothing else changes. With top_k >= L - 1, or None, it is bit for bit the full read.
    """
    if top_k is None or top_k >= weights.shape[-1] - 1:
        return weights
    by_weight = weights[..., 1:].argsort(dim=-1, descending=True, stable=True)
    return weights.scatter(-1, by_weight[..., top_k:] + 1, 0.0)


class ScoreBias(HeadBias):
    """The weights [B, T, H, L] from logits, and from scores times SHARPNESS * tau. tau [H] starts at one value.

    The arguments of its `forward` are those of `loglinear.ops.routed_weights`.
    """

    def __init__(self, num_heads: int, start: float) -> None:
        super().__init__()
        self.num_heads, self.start = num_heads, start
        self.tau = nn.Parameter(torch.full((num_heads,), float(start)))

    def initial_values(self) -> dict[str, Tensor]:
        return {"tau": torch.full((self.num_heads,), float(self.start))}

    def forward(self, logits: Tensor, scores: Tensor, tokens: Tensor, impl: str) -> Tensor:
        return routed_weights(logits, scores, tokens, self.tau, sharpness=SHARPNESS, impl=impl)


class BucketWeights(nn.Module):
    """The weights w [B, T, H, L] of the routed read, in float32 (float64 for a float64 model).

        a[t, b] = (W x_t + bias)[b] + 4 tau score(t, b),    w[t, b] = n_t softmax_b a[t, b]

    n_t is the number of buckets that hold a token. Over these the weights have mean one; empty buckets have the weight
    0. W and the bias start at zero. If tau is zero too, every weight is exactly 1: the model is the linear model.

    The layer `proj` holds W [H L, D] and the bias [H L], and `score_bias` holds tau [H]. `key_weights` holds the
    weights of keys in the score "selective_gram".

    Args:
        hidden_size: D.
        heads: The heads of the layer.
        num_columns: L, at least 2.
        routing: The score, and the value of tau at the start.

    Raises:
        ValueError: Fewer than 2 columns, or a choice that is not allowed.
    """

    def __init__(self, hidden_size: int, heads: HeadSizes, num_columns: int, routing: Routing) -> None:
        super().__init__()
        if num_columns < 2:
            raise ValueError(f"num_columns must be at least 2 (with one bucket its weight is 1), got {num_columns}")
        self.shape = (heads.num_heads, num_columns)
        self.proj = ZeroLinear(hidden_size, heads.num_heads * num_columns)
        self.score_bias = ScoreBias(heads.num_heads, routing.checked().tau)
        self.sums: dict[str, Any] = {
            "groups": heads.num_groups,
            "key_dim": heads.key_dim,
        }  # of the call of `bucket_scores`
        self.key_weights: KeyWeights | None = None
        if routing.score == "selective_gram":
            self.key_weights = KeyWeights(hidden_size, heads.num_groups, heads.key_dim)
            self.sums = self.key_weights.sums

    def operands(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries and keys of the call of `bucket_scores`, for the layer's q and k [B, T, G, K]."""
        return (q, k) if self.key_weights is None else self.key_weights.operands(x, q, k)

    def forward(self, x: Tensor, scores: Tensor, tokens: Tensor, impl: str = "auto") -> Tensor:
        """Return the weights.

        Args:
            x: [B, T, D], the hidden states.
            scores: [B, T, G, L], of `loglinear.ops.bucket_scores` with the `operands`.
            tokens: [B or 1, T, L], the tokens of the buckets.
            impl: The implementation, as of `loglinear.ops.routed_weights`.
        """
        if self.key_weights is not None:
            scores = self.key_weights.scores(scores, tokens)
        return self.score_bias(self.proj(x).unflatten(-1, self.shape), scores, tokens, impl)

"""A mixer with a candidate's read, computed as a T x T matrix."""

# B batch, T time, D hidden size, G groups, H heads, K key, V value, R routing numbers, N buckets
# Z query blocks, C key blocks, f tokens of a finest block
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.reads.dense import absorbed, block_coefficients, linear_coefficients
from experiments.reads.partition import Partition
from experiments.reads.read import Read
from loglinear.layers.level_scales import ZeroLinear
from loglinear.layers.mixer import Mixer
from loglinear.models import LogLinearForCausalLM
from loglinear.ops.problem import unit_length

ROUTING_DIM = 16  # R
SHARPNESS = 4.0  # factor of tau: its learning is as fast as with a learning rate that many times larger
ETAS = (1.0, 0.5, 0.25, 0.0)
RHO = 0.4  # a residual's gate at the start


class HeadVector(nn.Module):
    """One value a head, used in its own forward pass."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(start)

    def forward(self) -> Tensor:
        return self.bias


class RoutedRead(nn.Module):
    """The weights of a candidate's buckets, from the hidden states and from what the buckets hold."""

    member: Tensor
    tokens: Tensor
    live: Tensor
    end: Tensor

    def __init__(self, mixer: Mixer, hidden_size: int, read: Read, length: int) -> None:
        super().__init__()
        self.read, self.heads = read, mixer.heads
        H, N = mixer.heads.num_heads, read.num_buckets(length)
        for name, tensor in Partition.of(read, length)._asdict().items():
            self.register_buffer(name, tensor, persistent=False)
        self.bias_proj = ZeroLinear(hidden_size, H * N)
        if read.score == "keys":
            self.proj = nn.Linear(hidden_size, 2 * H * ROUTING_DIM, bias=False)
            self.conv = nn.Conv1d(2 * H * ROUTING_DIM, 2 * H * ROUTING_DIM, 4, padding=3, groups=2 * H * ROUTING_DIM)
        if read.score != "none":
            self.temperature = HeadVector(torch.full((H,), 0.0 if read.late else 1.0))
        if read.eta:
            self.eta = HeadVector(torch.tensor([ETAS[head % len(ETAS)] for head in range(H)]))
        if read.residual:
            self.gate, self.rho = ZeroLinear(hidden_size, H), HeadVector(torch.full((H,), RHO))
            self.null = ZeroLinear(hidden_size, H)

    def partition(self, length: int) -> Partition:
        """Return the partition of a sequence; ValueError if its length is no multiple of the finest block."""
        if length % self.read.finest:
            raise ValueError(f"length must be a multiple of {self.read.finest} tokens, got {length}")
        whole = Partition(self.member, self.tokens, self.live, self.end)
        return whole.first(length // self.read.finest)

    def block_scores(self, x: Tensor, q: Tensor, k: Tensor, qk: Tensor, kk: Tensor, beta: Tensor | None) -> Tensor:
        """Return a number [B, H or 1, T, C] for each token and block, whose sum over a bucket is its score."""
        f, score = self.read.finest, self.read.score
        if score == "keys":
            mixed = self.conv(self.proj(x).mT)[..., : x.shape[1]].unflatten(1, (2 * self.heads.num_heads, ROUTING_DIM))
            own_q, own_k = F.normalize(mixed.mT, dim=-1).chunk(2, 1)
            return own_q @ own_k.unflatten(2, (-1, f)).sum(3).mT
        cosines = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).unflatten(3, (-1, f))
        if score == "qk":
            return cosines.sum(-1)
        if score == "gram":
            return cosines.square().sum(-1) - f / q.shape[-1]
        if beta is None:
            raise ValueError(f"score {score} needs the delta rule")
        return absorbed(qk, kk, beta, f)

    def logits(self, x: Tensor, scores: Tensor | None, part: Partition) -> Tensor:
        """Return a [B, H, Z, f, N], -inf where a bucket is empty, from scores of that shape or without them."""
        shape = (len(part.live), self.read.finest)
        a = self.bias_proj(x).unflatten(-1, (self.heads.num_heads, -1)).transpose(1, 2).unflatten(2, shape)
        if scores is not None:
            a = a + SHARPNESS * self.temperature()[:, None, None, None] * scores
        return a.masked_fill(~part.live[:, None], float("-inf"))


class RoutedMixer(Mixer):
    """A `Mixer` whose operator reads the buckets with the weights of a `RoutedRead`, for whole sequences."""

    routed: RoutedRead

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        z, qkv = self._project(x)
        qkv, _ = self.conv(qkv, None, None)
        tensors, v = self._operands(x, qkv)
        return self._output(self.read(x, *tensors[:-1]), v, z), None  # type: ignore[arg-type]  # only gates can be None

    def read(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None = None
    ) -> Tensor:
        """Return the operator's output [B, T, H, V]."""
        routed, spec = self.routed, self.routed.read
        T, f, part = x.shape[1], spec.finest, self.routed.partition(x.shape[1])
        if self.variant.l2_normalize:
            q, k = unit_length(q), unit_length(k)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        qk, kk = q @ k.mT, k @ k.mT
        strength = None if beta is None else beta.transpose(1, 2)
        linear = block_coefficients(qk, kk, strength, f) if spec.unerased else linear_coefficients(qk, kk, strength)
        decay = x.new_zeros(1, 1, T) if log_decay is None else log_decay.transpose(1, 2).cumsum(-1)
        ends = self._ends(decay, part)  # G at the end of the bucket of each block, as each token sees it
        between = decay[..., :, None] - ends  # from there to the token: [B, H, T, C]
        if spec.eta:
            between = between * routed.eta()[:, None, None]
        since = ends[..., None] - decay.unflatten(2, (-1, f))[:, :, None]  # [B, H, T, C, f]
        causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril().unflatten(1, (-1, f))
        fade = (between[..., None] + since).masked_fill(~causal, float("-inf")).exp()
        coefficients = self.variant.scale * linear.unflatten(3, (-1, f)) * fade
        scores = self._scores(x, q, k, qk, kk, strength, coefficients, v)
        a = routed.logits(x, scores, part)
        if spec.residual:
            far = self._residual(x, a, part)[..., None] * since.masked_fill(~causal, float("-inf")).exp()
            own = block_coefficients(qk, kk, strength, f)
            coefficients = coefficients + self.variant.scale * far * own.unflatten(3, (-1, f))
        else:
            w = a.softmax(-1) * part.live.sum(-1)[:, None, None]
            coefficients = coefficients * self._of_blocks(w, part)[..., None]
        return (coefficients.flatten(3) @ v).transpose(1, 2)

    def _scores(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        qk: Tensor,
        kk: Tensor,
        beta: Tensor | None,
        coefficients: Tensor,
        v: Tensor,
    ) -> Tensor | None:
        """Return the scores [B, H, Z, f, N] of the buckets; the token's own one has 0, unless it is an energy."""
        spec, part = self.routed.read, self.routed.partition(x.shape[1])
        if spec.score == "none":
            return None
        if spec.score == "energy":
            reads = torch.einsum("bhtcs,bhcsv->bhtcv", coefficients, v.unflatten(2, (-1, spec.finest)))
            reads = torch.einsum("bhzfcv,zcn->bhzfnv", reads.unflatten(2, (-1, spec.finest)), part.member)
            return (reads.square().sum(-1) + 1e-4).log() / 8
        blocks = self.routed.block_scores(x, q, k, qk, kk, beta)
        sums = torch.einsum("bhzfc,zcn->bhzfn", blocks.unflatten(2, (-1, spec.finest)), part.member)
        if spec.score in ("keys", "qk"):
            sums = sums * part.tokens.rsqrt()[:, None]
        own = torch.zeros_like(sums[..., :1])
        return torch.cat([own.expand(*own.shape), sums[..., 1:]], -1)

    def _residual(self, x: Tensor, a: Tensor, part: Partition) -> Tensor:
        """Return rho_t pi [B, H, T, C]: the gate times the softmax over far buckets and the null route."""
        routed, shape = self.routed, (len(part.live), self.routed.read.finest)
        null = routed.null(x).transpose(1, 2).unflatten(2, shape)[..., None]
        pi = torch.cat([null, a[..., 1:]], -1).softmax(-1)
        rho = (routed.gate(x) + routed.rho()).transpose(1, 2).unflatten(2, shape)[..., None]
        return self._of_blocks(torch.cat([torch.zeros_like(null), rho * pi[..., 1:]], -1), part)

    def _of_blocks(self, weights: Tensor, part: Partition) -> Tensor:
        """Return weights [B, H, Z, f, N] of buckets as those of blocks, [B, H, T, C]."""
        return torch.einsum("bhzfn,zcn->bhzfc", weights, part.member).flatten(2, 3)

    def _ends(self, decay: Tensor, part: Partition) -> Tensor:
        """Return the cumulative log decay at the end of the bucket of each block: [B, H, T, C].

        A token's own block ends with the token itself.
        """
        f, Z = self.routed.read.finest, len(part.live)
        ends = decay[..., f - 1 :: f][..., part.end]  # [B, H, Z, C]
        ends = ends.repeat_interleave(f, 2)
        own = torch.eye(Z, dtype=torch.bool, device=decay.device).repeat_interleave(f, 0)
        return torch.where(own, decay[..., None], ends)


def adapt(model: LogLinearForCausalLM, read: Read, length: int) -> None:
    """Give every mixer of a linear model the read of a candidate, for sequences of at most `length` tokens."""
    for block in model.model.layers:
        mixer = block.mixer
        assert isinstance(mixer, Mixer)
        if mixer.heads.num_groups not in (1, mixer.heads.num_heads):
            raise ValueError(f"a read needs one group or one for each head, got {mixer.heads.num_groups}")
        mixer.__class__ = RoutedMixer
        mixer.routed = RoutedRead(mixer, model.config.hidden_size, read, length)

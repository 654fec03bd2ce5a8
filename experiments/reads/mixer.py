"""A mixer with a candidate's read, in chunks of plain torch. For short sequences: O(T^2 / CHUNK) reads of states."""

# B batch, T time, H heads, G groups, K key, V value, R routing numbers, N buckets
# Z chunks, C tokens of a chunk, D distance in chunks
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.reads.chunks import Chunks, by_distance
from experiments.reads.partition import CHUNK, Buckets, between, inside
from experiments.reads.read import Read
from loglinear.layers.level_scales import ZeroLinear
from loglinear.layers.mixer import Mixer
from loglinear.layers.routing import SHARPNESS
from loglinear.models import LogLinearForCausalLM
from loglinear.ops.problem import unit_length

ROUTING_DIM = 16  # R
ETAS = (1.0, 0.5, 0.25, 0.0)
RHO = 0.4  # gate of the residual at the start


class HeadVector(nn.Module):
    """One value for each head, as a module with a forward pass."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(start)

    def forward(self) -> Tensor:
        return self.bias


class Reads(NamedTuple):
    """The reads of a linear model, before they are added up."""

    own: Tensor  # [B, H, Z, C, V] in the token's own chunk
    older: Tensor  # [B, H, Z, C, D, V] in the chunk D + 1 chunks back, before it fades
    fade: Tensor  # [B, H, Z, C, D] the factor by which it fades from there to the token


class RoutedRead(nn.Module):
    """The logits of a candidate's buckets, from the hidden states and from the contents of the buckets.

    If the own chunk has more than one bucket, its columns come first. The columns of older chunks follow.
    """

    def __init__(self, mixer: Mixer, hidden_size: int, read: Read, length: int) -> None:
        super().__init__()
        if read.eta and read.finest != CHUNK:
            raise ValueError(f"eta needs a finest block of {CHUNK} tokens, got {read.name}")
        self.read, self.heads = read, mixer.heads
        self.far, near = _Constants(between(read, length)), inside(read)
        self.near = None if near is None else _Constants(near)
        H, N = mixer.heads.num_heads, self.far.member.shape[2] - 1 + (1 if near is None else near.member.shape[2])
        self.bias_proj = ZeroLinear(hidden_size, H * N)
        if read.score == "keys":
            width = 2 * H * ROUTING_DIM
            self.proj = nn.Linear(hidden_size, width, bias=False)
            self.conv = nn.Conv1d(width, width, 4, padding=3, groups=width)
        if read.score != "none":
            self.temperature = HeadVector(torch.full((H,), 0.0 if read.late else 1.0))
        if read.eta:
            self.eta = HeadVector(torch.tensor([ETAS[head % len(ETAS)] for head in range(H)]))
        if read.residual:
            self.gate, self.rho = ZeroLinear(hidden_size, H), HeadVector(torch.full((H,), RHO))
            self.null = ZeroLinear(hidden_size, H)

    def by_chunk(self, x: Tensor) -> Tensor:
        """Return x [B, T, H...] as [B, H, Z, C, ...]."""
        return x.unflatten(2, (self.heads.num_heads, -1)).transpose(1, 2).unflatten(2, (-1, CHUNK))

    def features(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return the q' and k' [B, H or G, Z, C, .] of a score that is their product."""
        if self.read.score != "keys":
            return F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        mixed = self.conv(self.proj(x).mT)[..., : x.shape[1]].mT
        own_q, own_k = (self.by_chunk(part) for part in mixed.chunk(2, -1))
        return F.normalize(own_q, dim=-1), F.normalize(own_k, dim=-1)

    def scores(self, x: Tensor, q: Tensor, k: Tensor, chunks: Chunks, reads: Reads) -> Tensor | None:
        """Return the scores [B, H or 1, Z, C, N] of all buckets; the own bucket's is 0, except as an energy."""
        score, Z = self.read.score, q.shape[2]
        far = self.far.first(Z)
        if score == "none":
            return None
        if score == "energy":
            member = by_distance(far.member.permute(2, 0, 1)[:, :, None])[:, :, 0]  # [N, Z, D]
            sums = torch.einsum("bhzcdv,bhzcd,nzd->bhzcnv", reads.older, reads.fade, member)
            sums = torch.cat([sums[:, :, :, :, :1] + reads.own[:, :, :, :, None], sums[:, :, :, :, 1:]], 4)
            return (sums.square().sum(-1) + 1e-4).log() / 8
        if score == "absorbed":
            if chunks.transition is None:
                raise ValueError("score absorbed needs the delta rule")
            left = torch.einsum("bhzck,bhykl->bhzcyl", q, chunks.transition)
            each = q.square().sum(-1, keepdim=True) - left.square().sum(-1)
        else:
            own_q, own_k = self.features(x, q, k)
            if score == "gram":
                hits = torch.einsum("bhzck,bhysk->bhzcys", own_q, own_k).square()
                each = hits.sum(-1) - CHUNK / q.shape[-1]
            else:
                each = torch.einsum("bhzck,bhyk->bhzcy", own_q, own_k.sum(3))
        sums = torch.einsum("bhzcy,zyn->bhzcn", each, far.member)
        if score in ("keys", "qk"):
            sums = sums * far.tokens.rsqrt()[:, None]
        sums = torch.cat([torch.zeros_like(sums[..., :1]), sums[..., 1:]], -1)
        if self.near is None:
            return sums
        if score not in ("keys", "qk", "gram"):
            raise ValueError(f"score {score} needs a finest block of {CHUNK} tokens, got {self.read.name}")
        hits = own_q @ own_k.mT
        hits = hits.square() - 1 / q.shape[-1] if score == "gram" else hits
        near = torch.einsum("bhzcs,csn->bhzcn", hits, self.near.member)
        if score != "gram":
            near = near * self.near.tokens.rsqrt()
        return torch.cat([torch.zeros_like(near[..., :1]), near[..., 1:], sums[..., 1:]], -1)

    def logits(self, x: Tensor, scores: Tensor | None, live: Tensor) -> Tensor:
        """Return a [B, H, Z, C, N], -inf where a bucket is empty."""
        a = self.by_chunk(self.bias_proj(x))
        if scores is not None:
            a = a + SHARPNESS * self.temperature()[:, None, None, None] * scores
        return a.masked_fill(~live, float("-inf"))

    def live(self, Z: int) -> Tensor:
        """Return [Z, C, N], true where a bucket holds something."""
        far = self.far.live[:Z, None].expand(Z, CHUNK, -1)
        return far if self.near is None else torch.cat([self.near.live.expand(Z, CHUNK, -1), far[..., 1:]], -1)


class _Constants(nn.Module):
    """The tensors of `Buckets`, on the device of the model."""

    member: Tensor
    tokens: Tensor
    live: Tensor
    end: Tensor

    def __init__(self, buckets: Buckets) -> None:
        super().__init__()
        for name, tensor in buckets._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    def first(self, units: int) -> Buckets:
        return Buckets(self.member, self.tokens, self.live, self.end).first(units)


class RoutedMixer(Mixer):
    """A `Mixer` whose operator reads the buckets with the weights of a `RoutedRead`, for whole sequences."""

    routed: RoutedRead

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        z, qkv, _ = self._project(x)
        qkv, _ = self.conv(qkv, None, None)
        tensors, v = self._operands(x, qkv)
        y = self.read(x, *tensors)  # type: ignore[arg-type]  # only gates can be None
        return self._output(y, v, z), None

    def read(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None = None
    ) -> Tensor:
        """Return the operator's output [B, T, H, V]; ValueError for a length that is no multiple of CHUNK."""
        if x.shape[1] % CHUNK:
            raise ValueError(f"length must be a multiple of {CHUNK} tokens, got {x.shape[1]}")
        routed, spec = self.routed, self.routed.read
        if self.variant.l2_normalize:
            q, k = unit_length(q), unit_length(k)
        q, k, v = (tensor.transpose(1, 2).unflatten(2, (-1, CHUNK)) for tensor in (q, k, v))
        if beta is not None:
            beta = beta.transpose(1, 2).unflatten(2, (-1, CHUNK))
        decay = x.new_zeros(*x.shape[:2], v.shape[1]) if log_decay is None else log_decay
        decay = decay.transpose(1, 2).cumsum(-1).unflatten(2, (-1, CHUNK))  # G [B, H, Z, C]
        chunks = Chunks.of(q, k, v, decay, beta)
        reads = chunks.reads(q if spec.unerased else None)
        last, far = decay[..., -1], routed.far.first(q.shape[2])
        ends = last[..., far.end]  # G at the end of each chunk's bucket [B, H, Z, Z]
        inside = by_distance((ends - last[:, :, None]).unsqueeze(3))  # from the chunk's end to there [B, H, Z, 1, D]
        after = by_distance(decay[..., None] - ends[..., None, :])  # from there to the token [B, H, Z, C, D]
        if spec.eta:
            after = after * routed.eta()[:, None, None, None]
        fade = (inside + after).clamp(max=80).exp()  # before the sequence it may exceed 1, but it multiplies 0 there
        own, live = chunks.own, routed.live(q.shape[2])
        a = routed.logits(x, routed.scores(x, q, k, chunks, Reads(own @ v, reads, fade)), live)
        if spec.residual:
            residual = (self._residual(x, a, far) * inside.exp())[..., None] * chunks.reads(q)
            far_reads = (fade[..., None] * reads).sum(4) + residual.sum(4)
        else:
            w = a.softmax(-1) * live.sum(-1, keepdim=True)
            near = w[..., : w.shape[-1] - far.member.shape[2] + 1]
            older = torch.cat([w[..., :1], w[..., near.shape[-1] :]], -1)
            own = own * (near if routed.near is None else torch.einsum("bhzcn,csn->bhzcs", near, routed.near.member))
            weights = fade * self._of_chunks(older, far)
            far_reads = (weights[..., None] * reads).sum(4)
        return (self.variant.scale * (own @ v + far_reads)).flatten(2, 3).transpose(1, 2)

    def _residual(self, x: Tensor, a: Tensor, far: Buckets) -> Tensor:
        """Return rho_t pi [B, H, Z, C, D], the gate times the softmax over older buckets and the null route."""
        routed = self.routed
        null = routed.by_chunk(routed.null(x))
        pi = torch.cat([null, a[..., 1:]], -1).softmax(-1)
        rho = routed.by_chunk(routed.gate(x)) + routed.rho()[:, None, None, None]
        return self._of_chunks(torch.cat([torch.zeros_like(null), rho * pi[..., 1:]], -1), far)

    def _of_chunks(self, weights: Tensor, far: Buckets) -> Tensor:
        """Return the weights of older chunks [B, H, Z, C, D] from those of older buckets [B, H, Z, C, N]."""
        return by_distance(torch.einsum("bhzcn,zyn->bhzcy", weights, far.member))


def adapt(model: LogLinearForCausalLM, read: Read, length: int) -> None:
    """Give every mixer of a linear model the read of a candidate, for sequences of at most `length` tokens."""
    for block in model.model.layers:
        mixer = block.mixer
        assert isinstance(mixer, Mixer)
        if mixer.heads.num_groups not in (1, mixer.heads.num_heads):
            raise ValueError(f"a read needs one group or one for each head, got {mixer.heads.num_groups}")
        mixer.__class__ = RoutedMixer
        mixer.routed = RoutedRead(mixer, model.config.hidden_size, read, length)

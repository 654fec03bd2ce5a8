# B batch, T time (queries), S keys seen so far, H query heads, G key/value heads, K head width
"""Softmax attention, for hybrid models and the Transformer baseline."""

import itertools
import threading
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loglinear.layers.slices import Slice

# Note [Packed softmax attention]. Each document of a packed row attends within itself. On a GPU, documents of LONG
# tokens or more go to cuDNN one by one, which is faster than one call for all. cuDNN plans each new length for tens of
# milliseconds, so it gets only multiples of PLANNED tokens, which occur again. Neighbours among the other documents
# share one call of varlen_attn. It supports heads of WIDTHS and is causal only with its window, which torch has from
# 2.11 on (AT_ONCE). Without it every document has a call of its own. The switch that keeps cuDNN away from other
# lengths is one for the whole process, so CHOOSING guards it.
AT_ONCE = torch.__version__ >= "2.11"
WIDTHS = range(8, 129, 8)
PLANNED, LONG = 1024, 4096
CHOOSING = threading.Lock()

Heads = tuple[Tensor, Tensor, Tensor]
"""q [B, H, T, K], k and v [B, G, S, K]; S - T older keys belong to the first document, or to every row."""


class KeyValueStore(Protocol):
    """A cache layer, which takes new keys and values [B, G, T, K] and returns all of them [B, G, S, K]."""

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]: ...


class AttentionContext(NamedTuple):
    """The inputs that the attention layers of one forward pass share."""

    cos: Tensor  # [B, T, K / 2] of the rotary embedding
    sin: Tensor  # [B, T, K / 2]
    mask: Tensor | None = None  # [B, 1, T, S] True at keys to attend to, or added to the scores; None: plain causal
    lengths: Tensor | None = None  # [N] on the CPU: tokens of each packed document (B = 1); None: not packed
    with_weights: bool = False  # True: layers also return attention weights, and `mask` covers packed documents too
    slices: Slice | None = None  # this device's part of sequences that lie on several devices; None: they are whole


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin [B, T, K / 2] in float32 of integer positions [B, T] (Su et al., arXiv 2104.09864)."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angle = positions.unsqueeze(-1).float() * theta**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [B, T, heads, K] with its pairs (x_i, x_{i + K/2}) rotated by their position's angles."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _is_long(length: int) -> bool:
    return length >= LONG and length % PLANNED == 0


def _key_lengths(heads: Heads, lengths: list[int]) -> list[int]:
    """Return the keys of each document: its own tokens, and the older keys in the first one."""
    q, k, _ = heads
    return [lengths[0] + k.shape[2] - q.shape[2], *lengths[1:]]


def _split(heads: Heads, lengths: list[int]) -> list[Heads]:
    keys = _key_lengths(heads, lengths)
    return list(zip(*(t.split(n, dim=2) for t, n in zip(heads, (lengths, keys, keys), strict=True)), strict=True))


def _has_flash(heads: Heads) -> bool:
    """Return True if FlashAttention's kernels support these heads and are not switched off."""
    q, k, v = heads
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, q.shape[1] != k.shape[1])
    return q.is_cuda and torch.backends.cuda.can_use_flash_attention(params)


class Attention(nn.Module):
    """Causal softmax attention with grouped key/value heads and rotary positions: [B, T, D] -> [B, T, D].

    Each packed document has its own causal attention, so nothing crosses a boundary. The second result of `forward` is
    the attention weights [B, H, T, S] if the context asks for them, else None.

    Args:
        hidden_size: D.
        num_heads: H, the query heads, a multiple of G.
        num_key_value_heads: G, the key/value heads.
        head_dim: K, an even number (rotary pairs).

    Raises:
        ValueError: H is no multiple of G, or K is odd.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int) -> None:
        super().__init__()
        if num_heads % num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads = {num_key_value_heads}, "
                f"got {num_heads}"
            )
        if head_dim % 2:
            raise ValueError(f"attention_head_dim must be even (rotary pairs), got {head_dim}")
        self.head_dim = head_dim
        self.widths = [num_heads * head_dim, num_key_value_heads * head_dim, num_key_value_heads * head_dim]
        self.grouped = num_heads != num_key_value_heads
        self.qkv_proj = nn.Linear(hidden_size, sum(self.widths), bias=False)
        self.out_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(
        self, x: Tensor, context: AttentionContext, store: KeyValueStore | None = None
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in self.qkv_proj(x).split(self.widths, dim=-1))
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if store is not None:
            k, v = store.update(k, v)
        weights = None
        if context.slices is not None:
            y = self._attend_slice((q, k, v), context.slices, context.lengths)
        elif context.with_weights:
            assert context.mask is not None
            y, weights = self._attend_with_weights(q, k, v, context.mask)
        elif context.lengths is None:
            y = self._attend(q, k, v, context.mask)
        else:
            y = self._attend_documents((q, k, v), context.lengths)
        return self.out_proj(y.transpose(1, 2).flatten(-2)), weights

    @torch._disable_dynamo  # no graph could hold the collectives
    def _attend_slice(self, heads: Heads, slices: Slice, lengths: Tensor | None) -> Tensor:
        """Attend from a slice's queries to its keys and the older ones of the document that it continues."""
        q, k, v = heads
        heads = (q, *slices.with_older_keys(k, v))
        return self._attend(*heads) if lengths is None else self._attend_documents(heads, lengths)

    @torch._disable_dynamo  # a graph would hold for these lengths alone; torch.compiler.disable imports the compiler
    def _attend_documents(self, heads: Heads, lengths: Tensor) -> Tensor:
        """Attend within each document: long ones alone, neighbouring short ones in one call.

        See Note [Packed softmax attention].
        """
        if not (AT_ONCE and self.head_dim in WIDTHS and _has_flash(heads)):
            return torch.cat(self._one_by_one(heads, lengths.tolist()), dim=2)
        runs = [(alone, list(run)) for alone, run in itertools.groupby(lengths.tolist(), key=_is_long)]
        attended: list[Tensor] = []
        for (alone, run), part in zip(runs, _split(heads, [sum(run) for _, run in runs]), strict=True):
            if alone:
                attended += [self._attend(*document) for document in _split(part, run)]
            elif any(run):
                attended.append(self._at_once(part, run))
        return torch.cat(attended, dim=2)

    def _one_by_one(self, heads: Heads, lengths: list[int]) -> list[Tensor]:
        """Attend within each document in a call of its own; cuDNN only gets lengths with a plan."""
        documents = [document for document in _split(heads, lengths) if document[0].shape[2]]
        backends = torch.backends.cuda
        if not heads[0].is_cuda:
            return [self._attend(*document) for document in documents]
        attended = []
        with CHOOSING:
            if not (backends.cudnn_sdp_enabled() and backends.flash_sdp_enabled()):
                return [self._attend(*document) for document in documents]
            try:
                for document in documents:
                    backends.enable_cudnn_sdp(document[0].shape[2] % PLANNED == 0)
                    attended.append(self._attend(*document))
            finally:
                backends.enable_cudnn_sdp(True)
        return attended

    def _at_once(self, heads: Heads, lengths: list[int]) -> Tensor:
        """Attend within all documents in one call of varlen_attn."""
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (t.squeeze(0).transpose(0, 1) for t in heads)
        if self.grouped:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        keys = _key_lengths(heads, lengths)
        ends, key_ends = (
            torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32).to(q.device, non_blocking=True)
            for n in (lengths, keys)
        )
        y = varlen_attn(q, k, v, ends, key_ends, max(lengths), max(keys), window_size=(-1, 0))
        assert isinstance(y, Tensor)  # more results need an option
        return y.transpose(0, 1).unsqueeze(0)

    def _attend_with_weights(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return softmax(q k^T / sqrt(K)) v and the softmax, which the kernels do not return."""
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = (q @ k.transpose(2, 3) * self.head_dim**-0.5).to(torch.promote_types(q.dtype, torch.float32))
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(-1).to(q.dtype)
        return weights @ v, weights

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend by one of torch's kernels."""
        causal = False
        if mask is None and 1 < q.shape[2] < k.shape[2]:
            return self._attend_older((q, k, v))
        if mask is None and q.shape[2] > 1:  # a branch: in a graph of any length a comparison is no bool
            causal = True
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype).clamp(min=torch.finfo(q.dtype).min)  # finite, so no row of the softmax is empty
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped)

    def _attend_older(self, heads: Heads) -> Tensor:
        """Attend causally, with S - T keys that are older than the first query."""
        from torch.nn.attention.bias import causal_lower_right

        q, k, v = heads
        grouped = self.grouped
        if grouped and not _has_flash(heads):  # the other kernels would get a mask [T, S] instead
            k, v, grouped = *(t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v)), False
        mask = causal_lower_right(q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)

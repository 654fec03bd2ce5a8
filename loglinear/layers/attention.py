# B batch, T time (queries), S keys seen so far, H query heads, G key/value heads, K head width
"""Softmax attention, for hybrid models and the Transformer baseline."""

import itertools
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

AT_ONCE = torch.__version__ >= "2.11"  # varlen_attn has its window, which makes it causal
HALF, FLASH_WIDTHS = (torch.float16, torch.bfloat16), range(8, 129, 8)  # of q, that varlen_attn takes
PLANNED = 1024  # cuDNN is the fastest, but plans each new length for tens of milliseconds: for multiples only
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class KeyValueStore(Protocol):
    """A cache layer: takes the new keys and values [B, G, T, K], returns all of them [B, G, S, K]."""

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]: ...


class AttentionContext(NamedTuple):
    """What every attention layer of one forward shares."""

    cos: Tensor  # [B, T, K / 2] of the rotary embedding
    sin: Tensor  # [B, T, K / 2]
    mask: Tensor | None = None  # [B, 1, T, S] True where a query may look; None: plain causal
    lengths: Tensor | None = None  # [N] on the CPU: tokens of each packed document (B = 1); None: not packed
    cu_seqlens: Tensor | None = None  # [N + 1] on the device: where they begin and end


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, K / 2] in float32 of integer positions [B, T] (Su et al., arXiv 2104.09864)."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angle = positions.unsqueeze(-1).float() * theta**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x_i, x_{i + K/2}) of x [B, T, heads, K] by their position's angles."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _is_planned(length: int) -> bool:
    return length > 0 and length % PLANNED == 0


class Attention(nn.Module):
    """Causal softmax attention with grouped key/value heads and rotary positions: [B, T, D] -> [B, T, D].

    Packed documents get one causal attention each; nothing crosses a boundary.
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

    def forward(self, x: Tensor, context: AttentionContext, store: KeyValueStore | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in self.qkv_proj(x).split(self.widths, dim=-1))
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if store is not None:
            k, v = store.update(k, v)
        if context.lengths is None or context.cu_seqlens is None:
            y = self._attend(q, k, v, context.mask)
        else:
            y = self._attend_documents(q, k, v, context.lengths, context.cu_seqlens)
        return self.out_proj(y.transpose(1, 2).flatten(-2))

    @torch._disable_dynamo  # a graph would be one for these lengths; torch.compiler.disable imports the whole compiler
    def _attend_documents(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, cu_seqlens: Tensor) -> Tensor:
        possible = q.is_cuda and q.dtype in HALF and q.shape[-1] in FLASH_WIDTHS
        flash = possible and torch.backends.cuda.flash_sdp_enabled()
        if flash and not AT_ONCE:
            with sdpa_kernel(WITHOUT_PLANS):
                return torch.cat(self._one_by_one(q, k, v, lengths.tolist()), dim=2)
        attended: list[Tensor] = []
        first = begin = 0
        for planned, group in itertools.groupby(lengths.tolist(), key=_is_planned):
            run = list(group)
            end = begin + sum(run)
            own_q, own_k, own_v = (t[:, :, begin:end] for t in (q, k, v))
            if planned or not flash:
                attended += self._one_by_one(own_q, own_k, own_v, run)
            elif any(run):
                own_ends = (cu_seqlens[first : first + len(run) + 1] - begin).to(torch.int32)
                attended.append(self._at_once(own_q, own_k, own_v, own_ends, max(run)))
            first, begin = first + len(run), end
        return torch.cat(attended, dim=2)

    def _one_by_one(self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> list[Tensor]:
        documents = zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True)
        return [self._attend(*document) for document in documents if document[0].shape[2]]

    def _at_once(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        copies = q.shape[1] // k.shape[1]
        q, k, v = (t.squeeze(0).transpose(0, 1) for t in (q, k, v))
        k, v = (t.repeat_interleave(copies, dim=1) if self.grouped else t for t in (k, v))
        y = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0))
        assert isinstance(y, Tensor)  # it gives more only where it is asked to
        return y.transpose(0, 1).unsqueeze(0)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        causal = mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped)

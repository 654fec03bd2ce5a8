# B batch, T time, N tokens of all sequences together, S sequences, W convolution kernel
"""Where the tokens of a batch lie. Computed once per forward, used by every layer."""

import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def of_any_length(x: Tensor) -> Tensor:
    """x; blocks that are compiled with it get one graph for every length that it may have, from the first on."""
    if not torch.compiler.is_compiling() and "torch._dynamo" in sys.modules:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


def own_boundaries(cu_seqlens: Tensor) -> Tensor:
    """A copy that nobody changes, as the operators' kernels take it. At `layouts` they keep what they make of it, for
    all layers and their backward."""
    boundaries = of_any_length(cu_seqlens.to(torch.int64, copy=True))
    if not torch.compiler.is_compiling():
        boundaries.layouts = {}  # type: ignore[attr-defined]
    return boundaries


class Packing(NamedTuple):
    """Ragged sequences, one behind the other in a batch of one: `cu_seqlens` [S+1] as FlashAttention names it.

    The convolution sees every sequence behind W - 1 slots of its own (its state, or zeros), so nothing leaks over a
    boundary: `head_slots` [S * (W-1)] are these, `token_slots` [N] the tokens', `tail_slots` [S * (W-1)] the last
    W - 1 of each sequence, its next state. `position` [N] counts the tokens of each sequence.
    """

    cu_seqlens: Tensor
    token_slots: Tensor
    head_slots: Tensor
    tail_slots: Tensor
    position: Tensor
    shape: tuple[int, int] | None = None
    """(B, T) of the padded batch that these tokens were taken from; None: the batch is packed already"""
    token_index: Tensor | None = None
    """[N] places of the tokens in the flattened padded batch"""

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Tensor, num_tokens: int, conv_kernel: int) -> "Packing":
        gap = conv_kernel - 1
        sequences = cu_seqlens.numel() - 1
        sequence_S = torch.arange(sequences, device=cu_seqlens.device)
        gap_W = torch.arange(gap, device=cu_seqlens.device)
        cu_seqlens = own_boundaries(cu_seqlens)
        first_S, last_S = cu_seqlens[:-1], cu_seqlens[1:]
        sequence_N = sequence_S.repeat_interleave(last_S - first_S, output_size=num_tokens)
        token_N = torch.arange(num_tokens, device=cu_seqlens.device)
        return Packing(
            cu_seqlens=cu_seqlens,
            token_slots=token_N + (sequence_N + 1) * gap,
            head_slots=((first_S + sequence_S * gap).unsqueeze(1) + gap_W).flatten(),
            tail_slots=((last_S + sequence_S * gap).unsqueeze(1) + gap_W).flatten(),
            position=token_N - first_S.index_select(0, sequence_N),
        )

    @staticmethod
    def from_mask(mask_BT: Tensor, conv_kernel: int) -> "Packing":
        """mask: True at real tokens, anywhere in the row. Every row is one sequence, of length zero if all padding."""
        token_index = mask_BT.flatten().nonzero().squeeze(1)
        cu_seqlens = F.pad(mask_BT.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        packing = Packing.from_cu_seqlens(cu_seqlens, token_index.numel(), conv_kernel)
        return packing._replace(shape=(mask_BT.shape[0], mask_BT.shape[1]), token_index=token_index)

    def unpad(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [1, N, ...]"""
        if self.token_index is None:
            return x
        return x.flatten(0, 1).index_select(0, self.token_index).unsqueeze(0)

    def pad(self, x: Tensor) -> Tensor:
        """[1, N, ...] -> [B, T, ...], zeros at the padding."""
        if self.shape is None or self.token_index is None:
            return x
        rows, time = self.shape
        padded = x.new_zeros(rows * time, *x.shape[2:]).index_copy(0, self.token_index, x.squeeze(0))
        return padded.unflatten(0, (rows, time))

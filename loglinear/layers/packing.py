# B batch, T time, N tokens of all sequences together, S sequences, W convolution kernel
"""The places of tokens in a packed or padded batch, computed once per forward pass for all layers."""

import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from loglinear.ops.state import unchanging


def of_any_length(x: Tensor) -> Tensor:
    """Return x, marked so that a compiled block has one graph for all lengths of x, from the first call on."""
    if not torch.compiler.is_compiling() and "torch._dynamo" in sys.modules:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


def own_boundaries(cu_seqlens: Tensor) -> Tensor:
    """Return an int64 copy of boundaries that never changes, so that the layouts made of it serve all layers."""
    return unchanging(of_any_length(cu_seqlens.to(torch.int64, copy=True)))


class Packing(NamedTuple):
    """Sequences of any lengths, laid end to end in a batch of one.

    For the convolution every sequence comes after W - 1 slots of its own (its state, or zeros), so nothing leaks over a
    boundary.
    """

    cu_seqlens: Tensor
    """[S+1] Boundaries of the sequences, as FlashAttention names them."""
    token_slots: Tensor
    """[N] Slots of the tokens."""
    head_slots: Tensor
    """[S * (W-1)] Slots before each sequence, for its state."""
    tail_slots: Tensor
    """[S * (W-1)] The last W - 1 slots of each sequence, its next state."""
    position: Tensor
    """[N] Position of each token in its sequence."""
    shape: tuple[int, int] | None = None
    """(B, T) of the padded batch that the tokens come from; None: the batch is already packed."""
    token_index: Tensor | None = None
    """[N] Places of the tokens in the flattened padded batch."""

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Tensor, num_tokens: int, conv_kernel: int) -> "Packing":
        """Return the packing of boundaries [S+1] of `num_tokens` tokens, for a convolution of `conv_kernel` taps."""
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
        """Return the packing of a padded batch: mask [B, T] is True at tokens, which may be anywhere in a row.

        Every row is one sequence; a row of padding is a sequence of length 0.
        """
        token_index = mask_BT.flatten().nonzero().squeeze(1)
        cu_seqlens = F.pad(mask_BT.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        packing = Packing.from_cu_seqlens(cu_seqlens, token_index.numel(), conv_kernel)
        return packing._replace(shape=(mask_BT.shape[0], mask_BT.shape[1]), token_index=token_index)

    def unpad(self, x: Tensor) -> Tensor:
        """Return the tokens [1, N, ...] of a padded batch [B, T, ...]."""
        if self.token_index is None:
            return x
        return x.flatten(0, 1).index_select(0, self.token_index).unsqueeze(0)

    def pad(self, x: Tensor) -> Tensor:
        """Return a padded batch [B, T, ...] of tokens [1, N, ...], with zeros at padding."""
        if self.shape is None or self.token_index is None:
            return x
        rows, time = self.shape
        padded = x.new_zeros(rows * time, *x.shape[2:]).index_copy(0, self.token_index, x.squeeze(0))
        return padded.unflatten(0, (rows, time))

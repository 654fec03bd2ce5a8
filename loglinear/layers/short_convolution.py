# B batch, T time, C channels, W kernel, S sequences
"""The short causal depthwise convolution with SiLU, in plain torch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loglinear.layers.packing import Packing
from loglinear.variants.base import at_least_float32


class NoConvolution(nn.Module):
    """The place of a `ShortConvolution` in a mixer without one: [B, T, C] as it is, with a state [S, 0, C]."""

    kernel = 1  # every token reads itself alone

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, state: Tensor | None = None, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
        sequences = len(x) if packing is None else packing.cu_seqlens.numel() - 1
        return x, x.new_zeros(sequences, 0, self.channels)


class ShortConvolution(nn.Module):
    """A causal depthwise convolution with SiLU, with zeros before a sequence's first token: [B, T, C] -> [B, T, C].

        y_t = silu(sum_w weight[:, w] x_{t - W + 1 + w} + bias)

    `forward(x, state, packing)` returns y and the new state. A state [S, W-1, C] holds the last W - 1 inputs of each
    sequence, so a sequence may come in pieces of any length. None starts new sequences.

    Args:
        channels: C.
        kernel: W, the taps, at least 1.
        bias: True for a bias per channel.

    Raises:
        ValueError: `kernel` is less than 1.
    """

    def __init__(self, channels: int, kernel: int, *, bias: bool) -> None:
        super().__init__()
        if kernel < 1:
            raise ValueError(f"conv_kernel must be at least 1, got {kernel}")
        self.channels, self.kernel = channels, kernel
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        with torch.no_grad():
            for name, value in self.initial_values().items():
                self.get_parameter(name).copy_(value)

    @property
    def taps(self) -> Tensor:
        """The weight [C, W]."""
        return self.weight

    def initial_values(self) -> dict[str, Tensor]:
        bound = self.kernel**-0.5
        values = {"weight": torch.empty(self.channels, self.kernel).uniform_(-bound, bound)}
        if self.bias is not None:
            values["bias"] = torch.zeros(self.channels)
        return values

    def forward(self, x: Tensor, state: Tensor | None = None, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
        if packing is None:
            return self._dense(x, state)
        if state is None and torch.compiler.is_compiling():
            return self._fused(x, packing)
        gap = self.kernel - 1
        sequences = packing.cu_seqlens.numel() - 1
        slots = x.new_zeros(x.shape[1] + sequences * gap, self.channels)
        if state is not None:
            slots = slots.index_copy(0, packing.head_slots, state.to(x.dtype).flatten(0, 1))
        slots = slots.index_copy(0, packing.token_slots, x.squeeze(0))
        y = self._convolve(slots.unsqueeze(0)).squeeze(0)
        new_state = slots.index_select(0, packing.tail_slots).unflatten(0, (sequences, gap))
        return y.index_select(0, packing.token_slots - gap).unsqueeze(0), new_state

    def _dense(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run a batch in which each row is one sequence."""
        gap = self.kernel - 1
        extended = F.pad(x, (0, 0, gap, 0)) if state is None else torch.cat([state.to(x.dtype), x], dim=1)
        return self._convolve(extended), extended[:, extended.shape[1] - gap :]

    def _fused(self, x: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """Run new packed sequences without copying them, in a form that a compiler fuses into one pass."""
        gap, position = self.kernel - 1, packing.position.unsqueeze(1)
        extended = F.pad(x, (0, 0, gap, 0))
        inside = [position >= gap - w for w in range(self.kernel)]  # True if a tap's input is in the same sequence
        tail = packing.cu_seqlens[1:].unsqueeze(1) - gap + torch.arange(gap, device=x.device)
        is_token = tail >= packing.cu_seqlens[:-1].unsqueeze(1)
        new_state = extended[0].index_select(0, tail.flatten() + gap).unflatten(0, tail.shape)
        return self._sum_taps(extended, inside), torch.where(is_token.unsqueeze(2), new_state, 0.0)

    def _sum_taps(self, extended: Tensor, inside: list[Tensor] | None = None) -> Tensor:
        """Return `_convolve` as a sum of taps in float32, as conv1d computes it.

        A tap counts for tokens at which its `inside` [T, 1] is True (None: all tokens).
        """
        time, dtype = extended.shape[1] - self.kernel + 1, extended.dtype
        weight, wide = at_least_float32(self.taps.to(dtype)), at_least_float32(extended)
        y = wide.new_zeros(()) if self.bias is None else at_least_float32(self.bias.to(dtype))
        for w, tap_weight in enumerate(weight.unbind(1)):
            tap = wide[:, w : w + time] * tap_weight
            y = y + (tap if inside is None else torch.where(inside[w], tap, 0.0))
        return F.silu(y).to(dtype)

    def _convolve(self, extended: Tensor) -> Tensor:
        """Return the outputs [B, T, C] of inputs [B, T + W - 1, C]."""
        if torch.compiler.is_compiling() and extended.shape[1] != self.kernel:
            return self._sum_taps(extended)
        weight = self.taps.to(extended.dtype)
        bias = None if self.bias is None else self.bias.to(extended.dtype)
        if extended.shape[1] == self.kernel:  # a decode step of one token: two small operations
            y = (extended * weight.t()).sum(1, keepdim=True)
            return F.silu(y if bias is None else y + bias)
        y = F.conv1d(extended.transpose(1, 2), weight.unsqueeze(1), bias, groups=self.channels)
        return F.silu(y).transpose(1, 2)

# B batch, T time, D hidden size, G groups, H heads, K key, V value, L levels, S sequences, W kernel
"""The base of the mixers: what happens to tokens, whoever owns the parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loglinear.layers.level_scales import LevelScales
from loglinear.layers.mixer_state import MixerDecodeState, MixerState, check_sums
from loglinear.layers.packing import Packing
from loglinear.layers.routing import BucketWeights, check_top_k, keep_largest
from loglinear.layers.short_convolution import NoConvolution, ShortConvolution
from loglinear.layers.slices import Slice
from loglinear.ops import (
    LogLinearOutput,
    bucket_scores,
    bucket_scores_step,
    log_linear_attention,
    log_linear_attention_step,
    log_linear_delta_rule,
    log_linear_delta_rule_step,
)
from loglinear.ops.scores import zero_sums
from loglinear.ops.state import empty_state
from loglinear.ops.step import check_step
from loglinear.ops.validation import check_tensor
from loglinear.partition import Partition
from loglinear.variants import HeadSizes
from loglinear.variants.base import at_least_float32

OPERATORS: dict[str, tuple[Callable[..., LogLinearOutput], Callable[..., Tensor]]] = {
    "scalar_gate": (log_linear_attention, log_linear_attention_step),
    "delta_rule": (log_linear_delta_rule, log_linear_delta_rule_step),
}
"""From a variant's transition to the operator and its step of one token."""


class TokenMixer(nn.Module):
    """The base of the mixers: the way of the tokens from their projections, through an operator, to the output.

        z, qkv, source = _project(x) ;  qkv = conv(qkv) ;  weights = LevelScales(x), or BucketWeights(x, scores)
        output = _output(operator(_operands(source, qkv), weights), v, z)

    A subclass owns the parameters. It sets the attributes below and defines the three methods at the end.
    """

    operator: Callable[..., LogLinearOutput]
    operator_step: Callable[..., Tensor]
    heads: HeadSizes
    transition: str
    diagonal_gate: bool = False
    scale: float
    l2_normalize: bool
    num_levels: int
    partition: Partition
    chunk_size: int
    impl: str
    conv: ShortConvolution | NoConvolution
    level_scales: LevelScales | None
    bucket_weights: BucketWeights | None
    decode_top_k: int | None = None
    """The buckets that a step of a routed read weights in each head, besides the token's own. None: all."""

    def mix(
        self,
        x: Tensor,
        packing: Packing | None = None,
        state: MixerState | MixerDecodeState | None = None,
        return_state: bool = False,
        active: Tensor | None = None,
        slices: Slice | None = None,
    ) -> tuple[Tensor, MixerState | MixerDecodeState | None]:
        """Return the output [B, T, D], and the new state or None.

        Args:
            x: [B, T, D], or [B, 1, D] with a `MixerDecodeState`.
            packing: The places of sequences in a padded or packed batch. None: each row is one sequence.
            state: The state to continue from. A `MixerDecodeState` changes in place. None starts new sequences.
            return_state: True to return the `MixerState` after the last token.
            active: [B] bool, with a `MixerDecodeState` alone. Inactive rows keep their state. None: all are active.
            slices: This device's part of sequences that lie on several devices: x holds its tokens. None: x is whole.

        Raises:
            ValueError: A `MixerDecodeState` comes with packing or more than one token per row, or `active` without one.
                A state has other sizes. decode_top_k is set in training. Slices come with a state
                or with another packing.
        """
        if self.decode_top_k is not None and self.training:
            raise ValueError(
                f"decode_top_k must be None in training, which reads all buckets, got {self.decode_top_k}: "
                "call model.eval() to decode, or loglinear.models.set_decode_top_k(model, None) to train"
            )
        if isinstance(state, MixerDecodeState):
            if packing is not None or x.shape[1] != 1:
                raise ValueError(
                    f"x must have shape [B, 1, D] without packing for a MixerDecodeState, got {list(x.shape)}"
                )
            self._check_own_parts(state, len(x), x.device)
            return self._step(x, state, active), state
        if active is not None:
            raise ValueError(f"active needs a MixerDecodeState as state, got {type(state).__name__}")
        if slices is not None and (state is not None or return_state):
            raise ValueError("slices exclude states: sequences on several devices start new and leave no state")
        if state is not None:
            rows = len(x) if packing is None else packing.cu_seqlens.numel() - 1
            self._check_own_parts(state, rows, x.device)
        if packing is not None:
            x = packing.unpad(x)
            if x.shape[1] == 0:  # all padding: no state changes, but every parameter needs a gradient of zero
                y, _ = self.mix(F.pad(x, (0, 0, 0, 1)))
                return packing.pad(y[:, :0]), state
        z, qkv, source = self._project(x)
        cu_seqlens = None if packing is None else packing.cu_seqlens
        if slices is None:
            inputs_before = None if state is None else state.conv
        else:
            inputs_before = slices.inputs_before(qkv, self.conv.kernel, cu_seqlens)
        qkv, conv_state = self.conv(qkv, inputs_before, packing)
        tensors, v = self._operands(source, qkv)
        sums = None
        if self.bucket_weights is None:
            weights = self._level_scales(x)
        else:
            q, k = tensors[:2]
            assert q is not None and k is not None  # only gates can be None
            q, k = self.bucket_weights.operands(x, q, k)
            tree: dict[str, Any] = dict(num_columns=self.num_levels, partition=self.partition, impl=self.impl)
            if slices is not None:
                found = slices.scores(q, k, **tree)
            else:
                found = bucket_scores(
                    q,
                    k,
                    initial_state=None if state is None else state.sums,
                    output_final_state=return_state,
                    cu_seqlens=cu_seqlens,
                    **tree,
                )
            weights, sums = self.bucket_weights(x, found.scores, found.tokens, self.impl), found.final_state
        options = dict(chunk_size=self.chunk_size, partition=self.partition, **self._options)
        if slices is not None:
            y, fenwick = slices.attend(self.transition, tensors, weights, **options), None
        else:
            y, fenwick = self.operator(
                *tensors,
                weights,
                initial_state=None if state is None else state.fenwick,
                output_final_state=return_state,
                cu_seqlens=cu_seqlens,
                **options,
            )
        y = self._output(y, v, z)
        if packing is not None:
            y = packing.pad(y)
        if fenwick is None:
            return y, None
        return y, MixerState(conv_state.clone(), fenwick, sums)  # a copy, because a view keeps the whole prompt alive

    def starting_at(self, position: Tensor | None, x: Tensor) -> MixerState | None:
        """Return the state of sequences that start at `position` [S] and have no token yet; None for new sequences.

        The state fits inputs like `x`. At an unchanging position layers share its parts, which nobody may change. The
        linear model has one level, so no position changes its results: None.
        """
        if position is None or self.num_levels == 1:
            return None
        return self.empty_state(len(position), x, position)

    def empty_state(self, rows: int, x: Tensor, position: Tensor | None = None) -> MixerState:
        """Return the state of sequences without a token, for inputs like `x`; without a position they start at 0."""
        heads = self.heads
        shared: dict[str, Any] = dict(
            partition=self.partition,
            position=position,
            dtype=torch.promote_types(x.dtype, torch.float32),
            device=x.device,
        )
        fenwick = empty_state(
            rows,
            num_levels=self.num_levels,
            chunk_size=self.chunk_size,
            groups=heads.num_groups,
            key_dim=heads.key_dim,
            heads=heads.num_heads,
            value_dim=heads.head_dim,
            delta_rule=self.transition == "delta_rule",
            diagonal_gate=self.diagonal_gate,
            **shared,
        )
        sums = None
        if self.bucket_weights is not None:
            sums = zero_sums(rows, num_columns=self.num_levels, **self.bucket_weights.sums, **shared)
        return MixerState(x.new_zeros(rows, self.conv.kernel - 1, self.conv.channels), fenwick, sums)

    def set_decode_top_k(self, top_k: int | None) -> None:
        """Choose how many buckets a step reads, as `Routing.top_k`.

        ValueError for a number below 1, or for any number without a routed read.
        """
        check_top_k(top_k)
        if top_k is not None and self.bucket_weights is None:
            raise ValueError(f"decode_top_k needs a routed read, got {top_k} without routing")
        self.decode_top_k = top_k

    @torch.no_grad()
    def _step(self, x: Tensor, state: MixerDecodeState, active: Tensor | None) -> Tensor:
        """Run one token per row."""
        z, qkv, source = self._project(x)
        qkv, conv_state = self.conv(qkv, state.conv)
        tensors, v = self._operands(source, qkv)
        tokens = [None if t is None else t[:, 0] for t in tensors]
        q, k = tokens[:2]
        assert q is not None and k is not None
        if self.bucket_weights is None or state.sums is None:
            weights = self._level_scales(x)
        else:
            L, impl = self.num_levels, self.impl
            # If the operator raises, no part of the state may have changed.
            check_step(*tokens, num_levels=L, state=state.decode, active=active, impl=impl)
            asked, keys = (t[:, 0] for t in self.bucket_weights.operands(x, q[:, None], k[:, None]))
            scores, counts = bucket_scores_step(asked, keys, state.sums, num_columns=L, active=active, impl=impl)
            weights = self.bucket_weights(x, scores[:, None], counts[:, None], impl)
            weights = keep_largest(weights, self.decode_top_k)
        options = self._options | dict(active=active, sparse=self.decode_top_k is not None)
        y = self.operator_step(*tokens, weights[:, 0], state.decode, **options)
        state.conv.copy_(conv_state if active is None else torch.where(active[:, None, None], conv_state, state.conv))
        return self._output(y[:, None], v, z)

    def _check_own_parts(self, state: Any, rows: int, device: torch.device) -> None:
        """Raise ValueError unless the convolution's part of a state fits; the operators check their own parts."""
        if not isinstance(state, MixerState | MixerDecodeState):
            raise ValueError(f"state must be a MixerState or a MixerDecodeState, got {type(state).__name__}")
        check_sums(state, self.bucket_weights is not None)
        if self.conv.kernel > 1:
            sizes = {"S": rows, "W": self.conv.kernel - 1, "C": self.conv.channels}
            check_tensor("state.conv", state.conv, "SWC", sizes, device)

    @property
    def _options(self) -> dict[str, Any]:
        """The operator's keyword arguments."""
        options: dict[str, Any] = dict(scale=self.scale, impl=self.impl)
        if self.transition == "delta_rule":
            options["l2_normalize"] = self.l2_normalize
        return options

    def _level_scales(self, x: Tensor) -> Tensor:
        """Return lambda [B, T, H, L]; ones for the linear model."""
        if self.level_scales is not None:
            return self.level_scales(x)
        one = at_least_float32(x.new_ones(1))
        return one.expand(*x.shape[:2], self.heads.num_heads, 1)

    def _project(self, x: Tensor) -> tuple[Any, Tensor, Any]:
        """Return z for `_output`, q, k, v before the convolution, and the source of the gates for `_operands`."""
        raise NotImplementedError

    def _operands(self, source: Any, qkv: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """Return the operator's tensors in its order, without lambda, and v from the convolution."""
        raise NotImplementedError

    def _output(self, y: Tensor, v: Tensor, z: Any) -> Tensor:
        """Return the mixer's output from the operator's."""
        raise NotImplementedError

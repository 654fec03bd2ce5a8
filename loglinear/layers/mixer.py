# B batch, T time, D hidden size, G groups, H heads, K key, V value, L levels, S sequences, W kernel
"""The token mixer of all variants, and its states."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loglinear.layers.former_names import rename_former
from loglinear.layers.gated_rms_norm import GatedRMSNorm
from loglinear.layers.level_scales import LevelScales
from loglinear.layers.packing import Packing
from loglinear.layers.routing import BucketWeights, Routing
from loglinear.layers.short_convolution import ShortConvolution
from loglinear.ops import (
    DecodeState,
    FenwickState,
    LogLinearOutput,
    bucket_scores,
    log_linear_attention,
    log_linear_attention_step,
    log_linear_delta_rule,
    log_linear_delta_rule_step,
)
from loglinear.ops.scores import add_keys, read_scores, zero_sums
from loglinear.ops.state import constants
from loglinear.ops.validation import check_tensor
from loglinear.partition import FENWICK, Partition
from loglinear.variants import HeadSizes, get_variant
from loglinear.variants.base import at_least_float32

OPERATORS: dict[str, tuple[Callable[..., LogLinearOutput], Callable[..., Tensor]]] = {
    "scalar_gate": (log_linear_attention, log_linear_attention_step),
    "delta_rule": (log_linear_delta_rule, log_linear_delta_rule_step),
}
"""From a variant's transition to the operator and its step of one token."""


class MixerState(NamedTuple):
    """The state of a mixer. It carries gradients, its size does not grow, and every row has its own position."""

    conv: Tensor
    """[S, W-1, 2 G K + H V] The last inputs of the convolution."""
    fenwick: FenwickState
    """The state of the operator."""
    sums: FenwickState | None = None
    """The sums of keys that a routed read scores; None without routing."""


class MixerDecodeState(NamedTuple):
    """A `MixerState` for decoding: `Mixer.step` changes its memory in place. It carries no gradients."""

    conv: Tensor
    """[S, W-1, 2 G K + H V] The last inputs of the convolution."""
    decode: DecodeState
    """The state of the operator."""
    sums: DecodeState | None = None
    """The sums of keys that a routed read scores; None without routing."""

    @classmethod
    def of(cls, state: MixerState) -> "MixerDecodeState":
        """Return a copy of a state without gradients; ValueError unless it is a `MixerState`."""
        if not isinstance(state, MixerState):
            raise ValueError(f"state must be a MixerState, got {type(state).__name__}")
        with constants():
            sums = None if state.sums is None else DecodeState.of(state.sums)
            return cls(state.conv.clone(memory_format=torch.contiguous_format), DecodeState.of(state.fenwick), sums)

    @torch.no_grad()
    def copy_(self, state: MixerState) -> None:
        """Copy the contents of another state into this one's memory; ValueError if the sizes differ."""
        if state.conv.shape != self.conv.shape:
            raise ValueError(f"state.conv must have shape {list(self.conv.shape)}, got {list(state.conv.shape)}")
        check_sums(state, self.sums is not None)
        self.decode.copy_(state.fenwick)
        if self.sums is not None and state.sums is not None:
            self.sums.copy_(state.sums)
        self.conv.copy_(state.conv)

    def state(self) -> MixerState:
        """Return the state from which sequences continue with more than one token.

        It shares this memory. `conv` is a copy if gradients are enabled: later steps would change what is saved for
        backward. The operator copies its own part.
        """
        sums = None if self.sums is None else self.sums.fenwick
        return MixerState(self.conv.clone() if torch.is_grad_enabled() else self.conv, self.decode.fenwick, sums)

    @property
    def tensors(self) -> list[Tensor]:
        """All parts that are tensors."""
        sums = [] if self.sums is None else self.sums.fenwick.tensors
        parts = (self.conv, *self.decode.fenwick.tensors, self.decode.inverse, *sums)
        return [part for part in parts if part is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.tensors)

    def index_select(self, rows: Tensor) -> "MixerDecodeState":
        """Return the state of these rows [n], in their order, in new memory; ValueError for an unknown row."""
        with constants():
            decode = self.decode.index_select(rows)  # checks the rows
            sums = None if self.sums is None else self.sums.index_select(rows)
            return MixerDecodeState(self.conv.index_select(0, rows), decode, sums)


def check_sums(state: MixerState | MixerDecodeState, routed: bool) -> None:
    """Raise ValueError unless a state has sums of keys exactly if its mixer has a routed read."""
    if (state.sums is not None) != routed:
        needs, has = ("sums", "none") if routed else ("no sums", "some")
        raise ValueError(f"state must have {needs}, as a mixer {'with' if routed else 'without'} routing, got {has}")


class Mixer(nn.Module):
    """Log-linear attention as a layer: [B, T, D] -> [B, T, D].

        z, (q, k, v) = W x ;  q, k, v = silu(conv(q, k, v)) ;  lambda = LevelScales(x), or BucketWeights(x, scores)
        y = operator(variant(x, q, k, v), lambda) ;  output = W_o norm(y, z)

    Each row of the batch is one sequence, unless `packing` describes the sequences. A sequence continues from the state
    that `return_state=True` returns. `step`, or a call with a `MixerDecodeState`, processes one token per row in place.

    Args:
        hidden_size: D.
        heads: H, G, K and V.
        variant: The base model, a name in `loglinear.variants.VARIANTS`.
        num_levels: L. 1 is the linear model of the same variant: lambda is 1 and has no parameters.
        lambda_form: "unit", "softplus" or "bounded"; see `LevelScales`.
        finest_block: The tokens of each aligned block of this size share one lambda of `LevelScales`.
        partition: The partition of the past in the operator. L counts its columns.
        routing: The choices of a routed read, whose weights take the place of `LevelScales`. None: no such read.
        conv_kernel: W, the tokens that the short convolution reads.
        chunk_size: C, tokens per chunk of the operator, a power of two.
        norm_eps: The epsilon of the output norm.
        impl: The implementation of the operator: "auto", "triton", "torch" or "reference".

    Raises:
        ValueError: An unknown variant or form, or sizes that do not fit; the message names the argument.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: HeadSizes,
        *,
        variant: str,
        num_levels: int,
        lambda_form: str = "unit",
        finest_block: int = 1,
        partition: Partition = FENWICK,
        routing: Routing | None = None,
        conv_kernel: int = 4,
        chunk_size: int = 64,
        norm_eps: float = 1e-5,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if num_levels < 1:
            raise ValueError(f"num_levels must be at least 1, got {num_levels}")
        self.variant = get_variant(variant)(hidden_size, heads)
        self.operator, self.operator_step = OPERATORS[self.variant.transition]
        self.heads, self.num_levels, self.partition = heads, num_levels, partition
        self.chunk_size, self.impl = chunk_size, impl
        self.key_width, self.value_width = heads.num_groups * heads.key_dim, heads.num_heads * heads.head_dim
        conv_width = 2 * self.key_width + self.value_width
        self.in_proj = nn.Linear(hidden_size, self.value_width + conv_width, bias=False)
        self.conv = ShortConvolution(conv_width, conv_kernel, bias=self.variant.conv_bias)
        self.level_scales: LevelScales | None = None
        self.bucket_weights: BucketWeights | None = None
        if routing is not None:
            self.bucket_weights = BucketWeights(hidden_size, heads.num_heads, num_levels, routing.checked().tau)
        elif num_levels > 1:
            self.level_scales = LevelScales(hidden_size, heads.num_heads, num_levels, lambda_form, finest_block)
        self.norm = GatedRMSNorm(
            heads.num_heads,
            heads.head_dim,
            heads.num_groups,
            gate_first=self.variant.gate_before_norm,
            eps=norm_eps,
        )
        self.out_proj = nn.Linear(self.value_width, hidden_size, bias=False)
        self.register_load_state_dict_pre_hook(rename_former)

    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        state: MixerState | MixerDecodeState | None = None,
        return_state: bool = False,
        active: Tensor | None = None,
    ) -> tuple[Tensor, MixerState | MixerDecodeState | None]:
        """Return the output [B, T, D], and the new state or None.

        Args:
            x: [B, T, D], or [B, 1, D] with a `MixerDecodeState`.
            packing: The places of sequences in a padded or packed batch. None: each row is one sequence.
            state: The state to continue from. A `MixerDecodeState` changes in place. None starts new sequences.
            return_state: True to return the `MixerState` after the last token.
            active: [B] bool, with a `MixerDecodeState` alone. Inactive rows keep their state. None: all are active.

        Raises:
            ValueError: A `MixerDecodeState` with packing or more than one token per row, `active` without one, or a
                state of other sizes.
        """
        if isinstance(state, MixerDecodeState):
            if packing is not None or x.shape[1] != 1:
                raise ValueError(
                    f"x must have shape [B, 1, D] without packing for a MixerDecodeState, got {list(x.shape)}"
                )
            self._check_own_parts(state, len(x), x.device)
            return self._step(x, state, active), state
        if active is not None:
            raise ValueError(f"active needs a MixerDecodeState as state, got {type(state).__name__}")
        if state is not None:
            rows = len(x) if packing is None else packing.cu_seqlens.numel() - 1
            self._check_own_parts(state, rows, x.device)
        if packing is not None:
            x = packing.unpad(x)
            if x.shape[1] == 0:  # all padding: no state changes, but every parameter needs a gradient of zero
                y, _ = self.forward(F.pad(x, (0, 0, 0, 1)))
                return packing.pad(y[:, :0]), state
        z, qkv = self._project(x)
        qkv, conv_state = self.conv(qkv, None if state is None else state.conv, packing)
        tensors, v = self._operands(x, qkv)
        cu_seqlens = None if packing is None else packing.cu_seqlens
        sums = None
        if self.bucket_weights is None:
            weights = self._level_scales(x)
        else:
            found = bucket_scores(
                *tensors[:2],  # type: ignore[arg-type]  # only gates can be None
                num_columns=self.num_levels,
                partition=self.partition,
                initial_state=None if state is None else state.sums,
                output_final_state=return_state,
                cu_seqlens=cu_seqlens,
                impl=self.impl,
            )
            weights, sums = self.bucket_weights(x, found.scores, found.tokens), found.final_state
        y, fenwick = self.operator(
            *tensors,
            weights,
            initial_state=None if state is None else state.fenwick,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            chunk_size=self.chunk_size,
            partition=self.partition,
            **self._options,
        )
        y = self._output(y, v, z)
        if packing is not None:
            y = packing.pad(y)
        if fenwick is None:
            return y, None
        return y, MixerState(conv_state.clone(), fenwick, sums)  # a copy, because a view keeps the whole prompt alive

    def starting_at(self, position: Tensor | None, x: Tensor) -> MixerState | None:
        """Return the state of sequences that start at `position` [S] and have no token yet; None for new sequences.

        The state fits inputs like `x`. The linear model has one level, so no position changes its results: None.
        """
        if position is None or self.num_levels == 1:
            return None
        heads, S = self.heads, len(position)
        shared: dict[str, Any] = dict(groups=heads.num_groups, key_dim=heads.key_dim, partition=self.partition)
        shared |= dict(position=position, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        fenwick = FenwickState.zeros(
            S,
            num_levels=self.num_levels,
            chunk_size=self.chunk_size,
            heads=heads.num_heads,
            value_dim=heads.head_dim,
            delta_rule=self.variant.transition == "delta_rule",
            **shared,
        )
        sums = None if self.bucket_weights is None else zero_sums(S, num_columns=self.num_levels, **shared)
        return MixerState(x.new_zeros(S, self.conv.kernel - 1, self.conv.channels), fenwick, sums)

    def step(self, x: Tensor, state: MixerDecodeState, active: Tensor | None = None) -> Tensor:
        """Return the output [B, 1, D] of one token per row [B, 1, D] and advance `state` in place, without gradients.

        Rows that are not `active` [B] keep their state.
        """
        # A call of the module, so hooks on its forward pass (offloading, sharding) run.
        return self(x, state=state, active=active)[0]

    @torch.no_grad()
    def _step(self, x: Tensor, state: MixerDecodeState, active: Tensor | None) -> Tensor:
        """Run one token per row."""
        z, qkv = self._project(x)
        qkv, conv_state = self.conv(qkv, state.conv)
        tensors, v = self._operands(x, qkv)
        tokens = [None if t is None else t[:, 0] for t in tensors]
        q, k = tokens[:2]
        assert q is not None and k is not None
        if self.bucket_weights is None or state.sums is None:
            weights = self._level_scales(x)
        else:
            scores, counts = read_scores(q, state.sums, num_columns=self.num_levels)
            weights = self.bucket_weights(x, scores[:, None], counts[:, None])
        # The operator goes first: if it raises, no part of the state has changed.
        y = self.operator_step(*tokens, weights[:, 0], state.decode, active=active, **self._options)
        if state.sums is not None:
            add_keys(k, state.sums, num_columns=self.num_levels, active=active)
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

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return z, and q, k, v before the convolution."""
        return self.in_proj(x).split([self.value_width, 2 * self.key_width + self.value_width], dim=-1)

    def _operands(self, x: Tensor, qkv: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """Return the operator's tensors in its order, without lambda, and v from the convolution."""
        q, k, v = qkv.split([self.key_width, self.key_width, self.value_width], dim=-1)
        q, k = (t.unflatten(-1, (self.heads.num_groups, self.heads.key_dim)) for t in (q, k))
        v = v.unflatten(-1, (self.heads.num_heads, self.heads.head_dim))
        operands = self.variant(x, q, k, v)
        # Named one by one: torch 2.11 compiles `*tensors, beta = operands` to a tuple where Python makes a list.
        gates = [operands.log_decay, operands.beta] if self.variant.transition == "delta_rule" else [operands.log_decay]
        return [operands.q, operands.k, operands.v, *gates], v

    @property
    def _options(self) -> dict[str, Any]:
        """The operator's keyword arguments."""
        options: dict[str, Any] = dict(scale=self.variant.scale, impl=self.impl)
        if self.variant.transition == "delta_rule":
            options["l2_normalize"] = self.variant.l2_normalize
        return options

    def _level_scales(self, x: Tensor) -> Tensor:
        """Return lambda [B, T, H, L]; ones for the linear model."""
        if self.level_scales is not None:
            return self.level_scales(x)
        one = at_least_float32(x.new_ones(1))
        return one.expand(*x.shape[:2], self.heads.num_heads, 1)

    def _output(self, y: Tensor, v: Tensor, z: Tensor) -> Tensor:
        """Return the mixer's output from the operator's: skip connection, norm and projection."""
        if self.variant.skip_bias is not None:
            y = self.variant.skip_bias(y, v)
        return self.out_proj(self.norm(y, z))

# B batch, T time, D hidden size
"""The base of upgraded mixers: transformers' module with its parameters, and our way of tokens through it."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from loglinear.layers import BucketWeights, LevelScales, Packing, ShortConvolution
from loglinear.layers.token_mixer import OPERATORS, TokenMixer
from loglinear.models import LogLinearConfig
from loglinear.models.inputs import TokenLayout
from loglinear.upgrades.cache import state_layer
from loglinear.variants import HeadSizes

NEW_PARTS = ("level_scales", "bucket_weights")
"""The submodules that an upgrade adds to a mixer."""


class UpgradedConv1d(ShortConvolution, nn.Conv1d):  # type: ignore[misc]  # attributes of the same names
    """A depthwise nn.Conv1d with weight [C, 1, W], called as a `ShortConvolution`.

    A convolution becomes one by a change of its class; its parameters stay.
    """

    @property
    def channels(self) -> int:  # type: ignore[override]
        return self.in_channels

    @property
    def kernel(self) -> int:  # type: ignore[override]
        return self.kernel_size[0]

    @property
    def taps(self) -> Tensor:
        return self.weight.squeeze(1)


class UpgradedMixer(TokenMixer):
    """The base of upgraded mixers.

    A subclass also inherits from transformers' class, `replaces`. A module of that class becomes one of the subclass by
    a change of its class in `become`. So its parameters, their names, hooks and references to it stay. The subclass
    adds `transition`, `l2_normalize` and the methods of `TokenMixer`.
    """

    replaces: ClassVar[type[nn.Module]]
    """The class of transformers whose modules become modules of this class."""
    masks_know_positions: ClassVar[bool] = True
    """True if the model's masks of full attention keep documents apart by their positions."""
    packs_documents: ClassVar[bool] = True
    """True if the model's other layers can keep packed documents apart."""
    layer_idx: int

    @classmethod
    def refusals(cls, theirs: nn.Module) -> list[str]:
        """Return a phrase for each option of transformers' module that this class does not represent exactly."""
        raise NotImplementedError

    @classmethod
    def sizes(cls, theirs: nn.Module) -> HeadSizes:
        """Return the heads of transformers' module."""
        raise NotImplementedError

    @classmethod
    def become(cls, theirs: Any, choices: LogLinearConfig) -> None:
        """Turn transformers' module into one of this class, in place, with level weights that are exactly 1."""
        heads = cls.sizes(theirs)
        change_class(theirs, cls)
        change_class(theirs.conv1d, UpgradedConv1d)
        theirs.operator, theirs.operator_step = OPERATORS[cls.transition]
        theirs.heads, theirs.num_levels, theirs.partition = heads, choices.num_levels, choices.partition
        theirs.chunk_size, theirs.impl = choices.chunk_size, choices.impl
        theirs.level_scales = theirs.bucket_weights = theirs.decode_top_k = None
        width, routing = theirs.hidden_size, choices.routing_choices
        with torch.inference_mode(False), theirs.conv1d.weight.device:  # whatever the caller's contexts say
            if routing is not None:
                theirs.bucket_weights = BucketWeights(width, heads, choices.num_levels, routing)
                theirs.set_decode_top_k(routing.top_k)
            else:
                theirs.level_scales = LevelScales(
                    width, heads.num_heads, choices.num_levels, choices.lambda_form, choices.shared_block
                )
            for name in NEW_PARTS:
                part = getattr(theirs, name)
                if part is not None:
                    part.train(theirs.training)
                    like_neighbour(part, theirs.conv1d.weight)

    @property
    def conv(self) -> ShortConvolution:  # type: ignore[override]
        return self.conv1d  # type: ignore[return-value]

    def forward(  # transformers passes these names
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        token_layout: TokenLayout | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the output [B, T, D].

        Args:
            hidden_states: [B, T, D].
            cache_params: transformers' cache, whose layer `layer_idx` holds the state.
            attention_mask: [B, T], 1 at tokens; read if there is no layout.
            token_layout: The places of the tokens, from the hook of the model. None: from attention_mask and
                cu_seq_lens_q.
        """
        if token_layout is None:
            token_layout = TokenLayout(self._packing(hidden_states, attention_mask, kwargs.get("cu_seq_lens_q")), None)
        if cache_params is None:
            return self.mix(hidden_states, token_layout.packing)[0]
        layer = state_layer(cache_params, self.layer_idx)
        state = layer.state
        if state is not None and hidden_states.shape[1] == 1 and not torch.is_grad_enabled():
            y, _ = self.mix(hidden_states, state=state, active=token_layout.active)
            return y
        past = None if state is None else state.state()
        y, new = self.mix(hidden_states, token_layout.packing, past, return_state=True)
        layer.store(new)
        return y

    def _packing(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Packing | None:
        """Return the packing of a layer that is called without a layout."""
        if cu_seqlens is not None:
            return Packing.from_cu_seqlens(cu_seqlens, x.shape[1], self.conv.kernel)
        return None if mask is None or x.shape[1] == 1 else Packing.from_mask(mask.bool(), self.conv.kernel)


def change_class(module: Any, new: type[nn.Module]) -> None:
    """Make a module one of another class, in place."""
    module.__class__ = new
    if hasattr(module, "_old_forward"):  # accelerate's hooks call the forward pass that they found
        module._old_forward = new.forward.__get__(module)


def like_neighbour(part: nn.Module, neighbour: Tensor) -> None:
    """Move a new part to the device and dtype of a parameter, but make it float32 beside one of 16 bits.

    In 16 bits a step of the optimiser that is small beside its weight rounds to nothing.
    """
    dtype = neighbour.dtype if neighbour.is_floating_point() else torch.float32  # quantized weights are integers
    part.to(neighbour.device, torch.promote_types(dtype, torch.float32))

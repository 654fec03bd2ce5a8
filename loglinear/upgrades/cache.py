# B batch, T time (new columns), S columns so far
"""The states of upgraded mixers in transformers' own caches."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from loglinear.layers import MixerDecodeState, MixerState
from loglinear.models.history import History, Seen


class StateLayer(LinearAttentionCacheLayerMixin):
    """One layer of a cache, with the state of an upgraded mixer in the place of transformers' linear state.

    It is the layer that transformers made, of a class that adds this one: keys and values of a layer that has both
    stay as they are. transformers reorders, resets and selects a cache layer by layer, so each layer has a `history`,
    and that of the first upgraded one describes the cache.
    """

    is_croppable = False  # type: ignore[assignment]  # a property in transformers
    state: MixerDecodeState | None
    history: History
    columns: int
    is_whole: bool

    def start(self) -> None:
        """Begin without a token."""
        self.state, self.history, self.columns, self.is_whole = None, History(), 0, True
        self.has_previous_state = dict.fromkeys(self.has_previous_state, False)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        raise ValueError("past_key_values holds states of an upgraded model: start with a new cache")

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        raise ValueError("past_key_values holds states of an upgraded model: start with a new cache")

    def store(self, state: MixerState | MixerDecodeState | None) -> None:
        """Store the state after new tokens; None or the layer's own state leaves it as it is."""
        if isinstance(state, MixerState):
            if self.state is None:
                self.state = MixerDecodeState.of(state)
            else:
                self.state.copy_(state)
        self.has_previous_state = dict.fromkeys(self.has_previous_state, True)

    def reset(self) -> None:
        super().reset()
        self.start()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.history.reorder(beam_idx)
        if self.state is not None:
            for part in self.state.tensors:
                part.copy_(part.index_select(0, beam_idx.to(part.device)))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError("the state of a log-linear layer cannot go back: start with a new cache")

    def activate_past_recording(self) -> None:
        raise ValueError("the state of a log-linear layer cannot go back, so no assistant can draft for this model")

    def batch_select_indices(self, indices: Tensor) -> None:
        self._others("batch_select_indices", indices)
        self.history.index_select(indices)
        if self.state is not None:
            self.state = self.state.index_select(indices.to(self.state.conv.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._others("batch_repeat_interleave", repeats)
        self.history.repeat_interleave(repeats)
        if self.state is not None:
            rows = torch.arange(self.state.conv.shape[0], device=self.state.conv.device)
            self.state = self.state.index_select(rows.repeat_interleave(repeats))

    def _others(self, method: str, argument: Any) -> None:
        """Call a method that only the class of keys and values has."""
        others = getattr(super(), method, None)
        if others is not None:
            others(argument)

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return 0 if self.state is None else self.state.nbytes


@functools.cache
def with_state(layer_class: type) -> type[StateLayer]:
    """Return the class of a layer of transformers' caches that also holds the state of an upgraded mixer."""
    return type(f"LogLinear{layer_class.__name__}", (StateLayer, layer_class), {"__module__": __name__})


def state_layer(cache: Cache, index: int) -> StateLayer:
    """Return layer `index` of a cache as a `StateLayer`; a layer without a token becomes one.

    Raises:
        ValueError: The cache was not made for this model, or it holds linear states of a model without levels.
    """
    layer = cache.layers[index] if index < len(cache.layers) else None
    if isinstance(layer, StateLayer):
        return layer
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        found = "none" if layer is None else type(layer).__name__
        raise ValueError(
            f"past_key_values must have a linear layer {index}, as DynamicCache(config=model.config) has, got {found}"
        )
    if any(layer.has_previous_state.values()):
        raise ValueError("past_key_values holds states of a model that was not upgraded: start with a new cache")
    return _become_state_layer(layer)


@torch.compiler.disable  # Dynamo would make the class again
def _become_state_layer(layer: Any) -> StateLayer:
    kind: Any = type(layer)
    layer.__class__ = with_state(kind)
    layer.start()
    return layer


class SeenColumns(Seen):
    """The columns that a cache of transformers has seen, as `TokenPlaces` asks for them.

    Args:
        cache: The cache.
        indices: The upgraded layers, in their order.
    """

    columns_limit = None

    def __init__(self, cache: Cache, indices: Sequence[int]) -> None:
        self.layers = [state_layer(cache, index) for index in indices]

    @property
    def first(self) -> StateLayer:
        return self.layers[0]

    @property
    def history(self) -> History:  # type: ignore[override]
        return self.first.history

    @property
    def is_whole(self) -> bool:  # type: ignore[override]
        return self.first.is_whole

    @property
    def has_states(self) -> bool:
        return all(layer.state is not None for layer in self.layers)

    def get_seq_length(self) -> int:
        return self.first.columns

    def extend(self, rows: int, time: int, real: Tensor | None, ids: Tensor | None, device: torch.device) -> None:
        """Note T new columns, before the layers see them; `finish` says that all of them have."""
        self.history.extend(rows, time, real, ids, device)
        self.first.columns += time
        self.first.is_whole = False

    def finish(self) -> None:
        self.first.is_whole = True

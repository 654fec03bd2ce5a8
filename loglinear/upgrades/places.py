# B batch, T time (new columns)
"""The hooks of an upgraded model: where its tokens lie, decided once per forward pass for all upgraded layers."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from loglinear.layers import Packing
from loglinear.models.inputs import TokenLayout, check_positions, one_of
from loglinear.models.places import TokenPlaces
from loglinear.upgrades.cache import SeenColumns
from loglinear.upgrades.checkpoint import layer_indices
from loglinear.upgrades.mixer import UpgradedMixer

BOUNDARIES = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def add_hooks(decoder: nn.Module) -> None:
    """Let a decoder, the module that gets tokens, mask, positions and cache, tell its upgraded layers the places."""
    decoder.register_forward_pre_hook(place_tokens, with_kwargs=True)
    decoder.register_forward_hook(finish, with_kwargs=True)


def place_tokens(decoder: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Check the arguments of a forward pass against the cache, and add the `token_layout` of the new tokens.

    Padding is taken out of the sequences. Packed documents have boundaries, by any of transformers' names for them, or
    in a batch of 1 `position_ids` that restart.

    Raises:
        ValueError: Arguments contradict each other, the shape of the tokens or what the cache has seen.
    """
    given = inspect.signature(decoder.forward).bind(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    tokens = one_of(given.get("input_ids"), given.get("inputs_embeds"))
    cache = given.get("past_key_values")
    added: dict[str, Any] = {}
    named = {name: given[name] for name in BOUNDARIES if given.get(name) is not None}
    positions = given.get("position_ids")
    positions = positions[0] if positions is not None and positions.dim() == 3 else positions  # text, time, height, ..
    if not named and cache is None and tokens.shape[0] == 1:
        named = boundaries_of(positions)
    if named and (cache is not None or given.get("use_cache")):
        raise ValueError("past_key_values cannot continue packed documents: pass them as rows of a padded batch")
    if named:
        added["use_cache"] = False
    elif cache is None and uses_cache(decoder, given.get("use_cache")):
        cache = added["past_key_values"] = DynamicCache(config=decoder.config)
    seen = None if cache is None else SeenColumns(cache, layer_indices(decoder))
    mask = given.get("attention_mask")
    if isinstance(mask, dict):  # `generate` makes the masks of a static cache by itself
        mask = mask.get("linear_attention")
    if mask is not None and mask.dim() == 4:
        raise ValueError("attention_mask [B, 1, T, S] says nothing to linear layers: pass it as [B, T]")
    places = TokenPlaces.of(tokens, seen, attention_mask=mask, **named)
    check_positions(positions, places)
    if seen is not None:
        seen.extend(places.rows, places.time, places.real, given.get("input_ids"), tokens.device)
    if places.cu_seqlens is not None and positions is None:
        added["position_ids"] = positions_of(places)  # full attention keeps documents apart by their positions
    added["token_layout"] = layout_of(places, kernel_of(decoder))
    return args, {**kwargs, **added}


def finish(decoder: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Note that all layers have seen the new tokens."""
    cache = inspect.signature(decoder.forward).bind(*args, **kwargs).arguments.get("past_key_values")
    if cache is not None:
        SeenColumns(cache, layer_indices(decoder)).finish()


def uses_cache(decoder: Any, use_cache: bool | None) -> bool:
    """Return True if transformers would make a cache for this call."""
    if decoder.training and getattr(decoder, "gradient_checkpointing", False):
        return False
    return bool(decoder.config.use_cache if use_cache is None else use_cache)


def kernel_of(decoder: nn.Module) -> int:
    """Return the taps of the convolutions."""
    return next(module.conv.kernel for module in decoder.modules() if isinstance(module, UpgradedMixer))


def boundaries_of(positions: Tensor | None) -> dict[str, Tensor]:
    """Return the cu_seqlens of positions [1, T] that restart, as transformers' own masks read them; else nothing."""
    if positions is None or positions.shape[-1] == 1:
        return {}
    starts = (positions[0, 1:] <= positions[0, :-1]).nonzero().squeeze(1) + 1
    if len(starts) == 0:
        return {}
    edges = starts.new_tensor([0, positions.shape[-1]])
    return {"cu_seqlens": torch.cat([edges[:1], starts, edges[1:]]).to(torch.int32)}


def positions_of(places: TokenPlaces) -> Tensor:
    """Return the position [1, T] of each token in its document."""
    assert places.cu_seqlens is not None
    return Packing.from_cu_seqlens(places.cu_seqlens, places.time, 1).position.unsqueeze(0)


def layout_of(places: TokenPlaces, kernel: int) -> TokenLayout:
    """Return the layout of tokens in these places."""
    if places.is_step:
        return TokenLayout(None, None, True, None if places.real is None else places.real[:, 0])
    if places.cu_seqlens is not None:
        return TokenLayout(Packing.from_cu_seqlens(places.cu_seqlens, places.time, kernel), None)
    return TokenLayout(None if places.real is None else Packing.from_mask(places.real, kernel), None)

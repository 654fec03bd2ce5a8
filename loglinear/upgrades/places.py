# B batch, T time (new columns)
"""The hooks of an upgraded model: where its tokens lie, decided once per forward pass for all upgraded layers."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask

from loglinear.layers import Packing
from loglinear.models.inputs import TokenLayout, check_positions, one_of
from loglinear.models.places import TokenPlaces
from loglinear.upgrades.cache import SeenColumns
from loglinear.upgrades.mixer import UpgradedMixer

BOUNDARIES = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
CACHES = ("past_key_values", "cache_params")
"""transformers' names for the cache, an argument of every decoder."""


def upgraded_mixers(model: Any) -> list[UpgradedMixer]:
    """Return the upgraded layers of a model, in their order."""
    return [module for module in model.modules() if isinstance(module, UpgradedMixer)]


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a model that gets tokens, mask, positions and cache: the smallest one with all its layers."""
    wanted = {id(mixer) for mixer in upgraded_mixers(model)}
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return [part for part in parts if wanted <= {id(module) for module in part.modules()}][-1]


class Placement:
    """The forward pre-hook of a decoder that checks its arguments and adds the `token_layout` of the new tokens.

    Padding is taken out of the sequences. Packed documents have boundaries, by any of transformers' names for them, or
    `position_ids` that restart, in a batch of 1 without a mask. A call without a cache gets the cache that transformers
    would make.

    The call raises ValueError if arguments contradict each other, the shape of the tokens or what the cache has seen.
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        mixers = upgraded_mixers(decoder)
        self.indices, self.kernel = [mixer.layer_idx for mixer in mixers], mixers[0].conv.kernel
        self.names = list(inspect.signature(decoder.forward).parameters)
        self.masks_know_positions, self.packs_documents = mixers[0].masks_know_positions, mixers[0].packs_documents
        self.cache_name = next(name for name in CACHES if name in self.names)

    def attach(self, decoder: PreTrainedModel, model: PreTrainedModel) -> None:
        """Add the hooks to the decoder of a model."""
        if self.cache_name == "cache_params" and model is not decoder:
            model.register_forward_pre_hook(carry_places, with_kwargs=True)
        decoder.register_forward_pre_hook(self, with_kwargs=True)
        decoder.register_forward_hook(self.finish, with_kwargs=True)

    def __call__(self, decoder: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        _refuse_slices(kwargs)
        if self.cache_name == "cache_params":
            kwargs = _with_one_cache(kwargs)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        added: dict[str, Any] = {}
        if is_carried(given.get("attention_mask")):
            given.update(given["attention_mask"])
            added["attention_mask"] = given["attention_mask"]
        tokens = one_of(given.get("input_ids"), given.get("inputs_embeds"))
        cache, positions = given.get(self.cache_name), _text_positions(given)
        named = {name: given[name] for name in BOUNDARIES if given.get(name) is not None}
        if not named and cache is None and given.get("attention_mask") is None and tokens.shape[0] == 1:
            named = _boundaries_of(positions)
        if named:
            if not self.packs_documents:
                raise ValueError(
                    f"{type(decoder).__name__} has attention that reads across packed documents: "
                    "pass them as rows of a padded batch"
                )
            if cache is not None or given.get("use_cache"):
                raise ValueError(
                    "past_key_values cannot continue packed documents: pass them as rows of a padded batch"
                )
            added["use_cache"] = False
        elif cache is None and self._uses_cache(decoder, given.get("use_cache")):
            cache = added[self.cache_name] = DynamicCache(config=decoder.config)
        seen = None if cache is None else SeenColumns(cache, self.indices)
        places = self._places(tokens, seen, given.get("attention_mask"), named)
        check_positions(positions, places)
        if seen is not None:
            seen.extend(places.rows, places.time, places.real, given.get("input_ids"), tokens.device)
        unplaced = given.get("position_ids") is None and "position_ids" in self.names
        if unplaced and (places.cu_seqlens is not None or places.past > 0):
            added["position_ids"] = _positions_of(places, tokens.device)
        if places.cu_seqlens is not None and not self.masks_know_positions:
            added["attention_mask"] = _masks_of_documents(decoder, tokens, places, named)
        added["token_layout"] = self._layout(places)
        kwargs.pop("cu_seqlens", None)  # this name is ours alone
        return args, {**kwargs, **added}

    def finish(self, decoder: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Note, as the decoder's forward hook, that all layers have seen the new tokens."""
        cache = {**dict(zip(self.names, args, strict=False)), **kwargs}.get(self.cache_name)
        if cache is not None:
            SeenColumns(cache, self.indices[:1]).finish()

    def _uses_cache(self, decoder: Any, use_cache: bool | None) -> bool:
        """Return True if transformers would make a cache for this call."""
        if decoder.training and getattr(decoder, "gradient_checkpointing", False):
            return False
        if use_cache is None and decoder.training and self.cache_name == "cache_params":
            return False
        return bool(decoder.config.use_cache if use_cache is None else use_cache)

    def _places(self, tokens: Tensor, seen: SeenColumns | None, mask: Any, named: dict[str, Any]) -> TokenPlaces:
        if isinstance(mask, dict):  # `generate` makes the masks of a static cache by itself
            mask = mask.get("linear_attention")
        if mask is not None and mask.dim() == 4:
            raise ValueError("attention_mask [B, 1, T, S] says nothing to linear layers: pass it as [B, T]")
        return TokenPlaces.of(tokens, seen, attention_mask=mask, **named)

    def _layout(self, places: TokenPlaces) -> TokenLayout:
        if places.is_step:
            return TokenLayout(None, None, True, None if places.real is None else places.real[:, 0])
        if places.cu_seqlens is not None:
            return TokenLayout(Packing.from_cu_seqlens(places.cu_seqlens, places.time, self.kernel), None)
        return TokenLayout(None if places.real is None else Packing.from_mask(places.real, self.kernel), None)


def carry_places(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """As a forward pre-hook, let positions and boundaries pass a model that gives its decoder only a mask and a cache.

    They go in the place of the mask, and the decoder's hook takes them out.
    """
    _refuse_slices(kwargs)
    if args:
        kwargs = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
    kwargs = _with_one_cache(kwargs)
    carried = {name: kwargs.pop(name) for name in ("position_ids", *BOUNDARIES) if kwargs.get(name) is not None}
    if carried:
        kwargs["attention_mask"] = {**carried, "attention_mask": kwargs.get("attention_mask")}
    return (), kwargs


def _refuse_slices(kwargs: dict[str, Any]) -> None:
    """Raise ValueError for slices: transformers' models ignore an argument that they do not know."""
    if kwargs.get("slices") is not None:
        raise ValueError("slices need a LogLinearForCausalLM or LogLinearModel, got an upgraded model of transformers")


def _with_one_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a Mamba-2 with its cache as `cache_params`, also if it came as `past_key_values`."""
    cache, others = kwargs.get("past_key_values"), {n: v for n, v in kwargs.items() if n != "past_key_values"}
    if cache is None:
        return others
    if others.get("cache_params") not in (None, cache):
        raise ValueError("past_key_values and cache_params are two names of the cache, got two caches")
    return {**others, "cache_params": cache}


def is_carried(mask: Any) -> bool:
    """Return True for a mask with the places that `carry_places` has added."""
    return isinstance(mask, dict) and "attention_mask" in mask


def _text_positions(given: dict[str, Any]) -> Tensor | None:
    """Return the positions [B or 1, T]; of four kinds [4, B, T] those of the text, which come first.

    Without them three kinds are left, time, height and width, in which the tokens of an image repeat: None.
    """
    positions = given.get("position_ids")
    if positions is None or positions.dim() == 2:
        return positions
    return positions[0] if len(positions) == 4 else None


def _boundaries_of(positions: Tensor | None) -> dict[str, Tensor]:
    """Return the cu_seqlens of positions [1, T] that restart, as transformers' own masks read them; else nothing."""
    if positions is None or positions.shape[-1] == 1:
        return {}
    starts = (positions[0, 1:] <= positions[0, :-1]).nonzero().squeeze(1) + 1
    if len(starts) == 0:
        return {}
    edges = starts.new_tensor([0, positions.shape[-1]])
    return {"cu_seqlens": torch.cat([edges[:1], starts, edges[1:]]).to(torch.int32)}


def _positions_of(places: TokenPlaces, device: torch.device) -> Tensor:
    """Return the position [1, T] of each column after those of the cache, or of each token in its document.

    Full attention keeps documents apart by their positions. Bamba would start again at 0 after a cache.
    """
    if places.cu_seqlens is None:
        return torch.arange(places.past, places.past + places.time, device=device).unsqueeze(0)
    return Packing.from_cu_seqlens(places.cu_seqlens, places.time, 1).position.unsqueeze(0)


def _masks_of_documents(decoder: Any, tokens: Tensor, places: TokenPlaces, named: dict[str, Tensor]) -> dict[str, Any]:
    """Return the masks of a decoder that makes none for packed documents, by the names of its kinds of layers."""
    like = torch.empty((*tokens.shape[:2], 0), dtype=decoder.dtype, device=tokens.device)
    positions = _positions_of(places, tokens.device)
    mask = create_causal_mask(decoder.config, like, None, None, position_ids=positions)
    assert places.cu_seqlens is not None
    if mask is None and len(places.cu_seqlens) > 2 and "cu_seq_lens_q" not in named:  # flash attention takes no mask
        raise ValueError(
            f"cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k must be given for packed documents in "
            f"{type(decoder).__name__} with {decoder.config._attn_implementation}, got {', '.join(named)}"
        )
    return {"full_attention": mask, "linear_attention": None}

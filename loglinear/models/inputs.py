# B batch, T time (new columns), S columns so far and new
"""The inputs that all layers of one forward pass share, made from the places of the tokens."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from loglinear.layers import AttentionContext, Packing, rotary_tables
from loglinear.layers.packing import of_any_length
from loglinear.layers.slices import Slice
from loglinear.models.cache import LogLinearCache
from loglinear.models.configuration import LogLinearConfig
from loglinear.models.places import TokenPlaces, has_shape
from loglinear.ops.continuation import sequence_of
from loglinear.ops.state import unchanging
from loglinear.ops.validation import INDICES, check_tensor, check_tree_positions


class TokenLayout(NamedTuple):
    """The inputs that the layers of one forward pass share."""

    packing: Packing | None  # for the mixers; None: dense
    attention: AttentionContext | None  # for full attention; None: the model has none of it
    is_step: bool = False  # one token per row from the states of a cache, without gradients: `Mixer.step`
    active: Tensor | None = None  # [B] True at rows for which the step has a token; None: all
    initial_position: Tensor | None = None  # [S] where new sequences start in the tree, unchanging; None: at 0
    slices: Slice | None = None  # this device's part of sequences that lie on several devices; None: they are whole


NEUTRAL = {"is_causal": True, "output_router_logits": False}  # arguments with one possible value here
LENGTHS = ("max_length_q", "max_length_k")  # collators pass these with the boundaries, which imply them


def one_of(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Return the argument that is not None; ValueError unless there is exactly one."""
    if inputs_embeds is None and input_ids is not None:
        return input_ids
    if inputs_embeds is not None and input_ids is None:
        return inputs_embeds
    raise ValueError("pass exactly one of input_ids and inputs_embeds")


def refuse_unknown(arguments: dict[str, Any], places: TokenPlaces) -> None:
    """Raise ValueError for an argument with a meaning that no model of the family supports."""
    for name, value in arguments.items():
        if value is None or (name in NEUTRAL and value == NEUTRAL[name]):
            continue
        if name in NEUTRAL:
            raise ValueError(f"{name} must be {NEUTRAL[name]} or left out, got {value}")
        if name not in LENGTHS:
            raise ValueError(f"forward takes no argument named {name}, got {value!r:.80}")
        longest = None if places.cu_seqlens is None else int(places.cu_seqlens.diff().max())
        if longest is None or int(value) < longest:
            needed = (
                "go with boundaries of documents" if longest is None else f"be at least {longest}, the longest document"
            )
            raise ValueError(f"{name} must {needed}, got {int(value)}")


class TokensFirst(NamedTuple):
    """An order of columns with the tokens of each row before its padding, so that the layers need no mask.

    The layers are causal, so tokens get the same outputs as without padding, and no shape depends on their number. A
    compiled graph of a padded batch needs both. Outside of graphs padding is removed instead, so it costs nothing.
    """

    order: Tensor  # [B, T]
    back: Tensor  # [B, T] the inverse

    @staticmethod
    def of(real: Tensor) -> "TokensFirst":
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
        return TokensFirst(order, order.argsort(dim=1))

    def apply(self, x: Tensor) -> Tensor:
        """Return x [B, T, ...] in this order."""
        return _reordered(x, self.order, 1)

    def undo(self, x: Tensor) -> Tensor:
        """Return x [B, T, ...] in the original order."""
        return _reordered(x, self.back, 1)

    def undo_weights(self, weights: Tensor) -> Tensor:
        """Return attention weights [B, H, T, T] with queries and keys in the original order."""
        return _reordered(_reordered(weights.transpose(1, 3), self.back, 1).transpose(1, 3), self.back, 2)


def _reordered(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """Return x [B, ...] with dimension `dim` of each row in the order [B, T]."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = order.shape
    return x.gather(dim, order.view(shape).expand_as(x))


def check_positions(position_ids: Tensor | None, places: TokenPlaces) -> None:
    """Raise ValueError for positions of another shape, or if they restart without boundaries.

    State would leak between packed documents.
    """
    if position_ids is not None and not any(has_shape(position_ids, rows, places.time) for rows in (1, places.rows)):
        raise ValueError(
            f"position_ids must have shape [{places.rows}, {places.time}] or [1, {places.time}], "
            f"got {list(position_ids.shape)}"
        )
    if position_ids is None or places.time == 1 or not (places.cu_seqlens is places.scores_mask is None):
        return
    restarts = position_ids[..., 1:] <= position_ids[..., :-1]
    if places.real is not None:
        restarts = restarts & places.real[:, 1:] & places.real[:, :-1]
    places.require(
        ~restarts.any(),
        "position_ids restart inside a row, as in packed documents, but no boundaries were given: "
        "pass cu_seqlens (or cu_seq_lens_q, seq_idx) with a batch of 1",
    )


def check_slices(places: TokenPlaces, use_cache: bool | None, start: Tensor | None, with_weights: bool | None) -> None:
    """Raise ValueError for slices with a cache, positions or attention weights, which they do not support."""
    if places.slices is None:
        return
    for name, value in (("use_cache", use_cache or None), ("initial_position", start)):
        if value is not None:
            raise ValueError(f"{name} must be left out with slices: their sequences start at 0 and leave no state")
    if with_weights:
        raise ValueError("output_attentions must be left out with slices: no rank has the weights of a whole sequence")


def places_from(position: Tensor | None, places: TokenPlaces) -> TokenPlaces:
    """Return the places of sequences that start at positions [B] or [n], if any: then they are no decode step.

    Raises ValueError unless the positions fit the sequences of the batch, all of them new.
    """
    if position is None:
        return places
    sequences = places.rows if places.cu_seqlens is None else len(places.cu_seqlens) - 1
    check_tensor("initial_position", position, "S", {"S": sequences}, None, INDICES)
    check_tree_positions("initial_position", position)
    places = places._replace(is_step=False)
    places.require(
        torch.as_tensor(places.past == 0),
        "initial_position needs new sequences, got past_key_values with positions of their own",
    )
    return places


def token_layout(
    config: LogLinearConfig,
    places: TokenPlaces,
    device: torch.device,
    position_ids: Tensor | None = None,
    cache: LogLinearCache | None = None,
    *,
    with_weights: bool = False,
    initial_position: Tensor | None = None,
) -> TokenLayout:
    """Return the layout of tokens in these places, and note their padding in the cache."""
    assert config.layer_types is not None
    has_linear, has_attention = ("linear_attention" in config.layer_types, "full_attention" in config.layer_types)
    if has_linear and places.scores_mask is not None:
        raise ValueError("attention_mask [B, 1, T, S] needs a model of full-attention layers alone: pass it as [B, T]")
    if with_weights and not has_attention:
        raise ValueError("output_attentions needs full-attention layers, and this model has linear layers alone")
    real_BT, packing = places.real, None
    if has_linear and places.cu_seqlens is not None:
        packing = Packing.from_cu_seqlens(places.cu_seqlens, places.time, config.taps)
    elif has_linear and real_BT is not None and not places.is_step:
        packing = Packing.from_mask(real_BT, config.taps)
    active = real_BT[:, 0] if places.is_step and real_BT is not None else None
    attention = None
    if has_attention:
        columns_BS = real_BT if cache is None else cache.extend_real(real_BT, places.rows, places.time, device)
        attention = _attention_context(config, places, device, position_ids, columns_BS, with_weights)
    if initial_position is not None:
        initial_position = unchanging(initial_position.to(device, torch.int64, copy=True))
    return TokenLayout(packing, attention, places.is_step, active, initial_position, places.slices)


def _attention_context(
    config: LogLinearConfig,
    places: TokenPlaces,
    device: torch.device,
    position_ids: Tensor | None,
    columns_BS: Tensor | None,
    with_weights: bool,
) -> AttentionContext:
    """Return the inputs of the full-attention layers."""
    column_T = places.past + torch.arange(places.time, device=device)
    if position_ids is None:
        position_ids = _positions(column_T, places.cu_seqlens, columns_BS)
        if places.slices is not None:
            first_end = places.time if places.cu_seqlens is None else places.cu_seqlens[1]
            position_ids = position_ids + places.slices.position * (column_T < first_end)
    assert config.attention_head_dim is not None
    cos, sin = rotary_tables(position_ids, config.attention_head_dim, config.rope_theta)
    lengths = None if places.cu_seqlens is None else of_any_length(places.cu_seqlens.diff().cpu())
    mask = places.scores_mask
    if mask is None and (with_weights or not _is_causal(places, columns_BS)):
        mask = _attention_mask(columns_BS, column_T, places)
    return AttentionContext(cos, sin, mask, lengths, with_weights, places.slices)


def _positions(column_T: Tensor, cu_seqlens: Tensor | None, columns_BS: Tensor | None) -> Tensor:
    """Return each token's position in its document or row, [1 or B, T]; padding does not count."""
    if columns_BS is not None:
        return (columns_BS.long().cumsum(1) - 1).clamp(min=0).index_select(1, column_T)
    if cu_seqlens is not None:
        column_T = column_T - cu_seqlens.to(column_T.dtype)[sequence_of(column_T, cu_seqlens)]
    return column_T.unsqueeze(0)


def _is_causal(places: TokenPlaces, columns_BS: Tensor | None) -> bool:
    """Return True if causal attention needs no mask: no padding, and queries start at the first key or are one."""
    if columns_BS is not None:
        return False
    return places.time == 1 or isinstance(places.past, int) and places.past == 0


def _attention_mask(columns_BS: Tensor | None, column_T: Tensor, places: TokenPlaces) -> Tensor:
    """Return [B or 1, 1, T, S], True at keys that a query attends to."""
    query_T = column_T.unsqueeze(1)
    keys = places.past + places.time if columns_BS is None else columns_BS.shape[1]
    key_S = torch.arange(keys, device=column_T.device)
    causal_TS = key_S <= query_T
    if places.cu_seqlens is not None:
        document_T = sequence_of(column_T, places.cu_seqlens)
        causal_TS = causal_TS & (document_T == document_T.unsqueeze(1))
    if columns_BS is None:
        return causal_TS[None, None]
    own_TS = key_S == query_T  # padding attends to itself, so no row of the softmax is empty
    return (causal_TS & columns_BS.unsqueeze(1) | own_TS).unsqueeze(1)

# B batch, T time (new columns), S columns so far and new, N tokens of all packed documents
"""From a model's arguments to where its tokens lie: packed documents, padding, positions. Computed once per forward."""

from typing import NamedTuple

import torch
from torch import Tensor

from loglinear.layers import AttentionContext, Packing, of_any_length, rotary_tables
from loglinear.models.cache import LogLinearCache
from loglinear.models.configuration import LogLinearConfig


class TokenLayout(NamedTuple):
    """What the layers of one forward share."""

    packing: Packing | None  # for the mixers; None: dense
    attention: AttentionContext | None  # for full attention; None: the model has none of it
    is_step: bool = False  # one token a row from the states of a cache, without gradients: `Mixer.step`
    active: Tensor | None = None  # [B] which rows the step has a token for; None: all


def document_boundaries(
    tokens: Tensor,
    *,
    cu_seqlens: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    seq_idx: Tensor | None,
) -> Tensor | None:
    """The cu_seqlens [n+1] of packed tokens [1, T, ...], however they were named; None: not packed.

    Raises ValueError where they do not describe a batch of one row with T tokens.
    """
    given = {"cu_seqlens": cu_seqlens, "cu_seq_lens_q": cu_seq_lens_q, "seq_idx": seq_idx}
    named = [(name, value) for name, value in given.items() if value is not None]
    if not named:
        return None
    name, boundaries = named[0]
    rows, time = tokens.shape[:2]
    if rows != 1:
        raise ValueError(f"{name} describes packed documents in a batch of 1, got a batch of {rows}")
    if name == "seq_idx":
        if boundaries.numel() != time:
            raise ValueError(f"seq_idx must have one entry per token ({time}), got shape {tuple(boundaries.shape)}")
        document_T = boundaries.reshape(-1).to(tokens.device)
        starts = (document_T[1:] != document_T[:-1]).nonzero().squeeze(1) + 1
        edges = starts.new_tensor([0, time])
        return torch.cat([edges[:1], starts, edges[1:]]).to(torch.int32)
    boundaries = boundaries.reshape(-1)
    ends = boundaries.tolist()
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != time or ends != sorted(ends):
        raise ValueError(f"{name} must rise from 0 to the number of tokens ({time}), got {ends}")
    return boundaries.to(tokens.device)


def new_columns(attention_mask: Tensor | None, tokens_shape: tuple[int, int], past: int) -> Tensor | None:
    """Which of the new columns [B, T] are tokens; None if no mask says. The mask may also cover the `past` columns."""
    if attention_mask is None:
        return None
    rows, time = tokens_shape
    if tuple(attention_mask.shape) not in ((rows, time), (rows, past + time)):
        raise ValueError(
            f"attention_mask must have shape [{rows}, {past + time}] (1 token, 0 padding), "
            f"got {list(attention_mask.shape)}"
        )
    return attention_mask[:, -time:].bool()


def check_positions(position_ids: Tensor | None, real_BT: Tensor | None) -> None:
    """Positions that restart mean packed documents, which need their boundaries: anything else leaks state."""
    if position_ids is None or position_ids.shape[-1] == 1:
        return
    restarts = position_ids[..., 1:] <= position_ids[..., :-1]
    if real_BT is not None:
        restarts = restarts & real_BT[:, 1:] & real_BT[:, :-1]
    if bool(restarts.any()):
        raise ValueError(
            "position_ids restart inside a row, as in packed documents, but no boundaries were given: "
            "pass cu_seqlens (or cu_seq_lens_q, seq_idx) with a batch of 1"
        )


def token_layout(
    config: LogLinearConfig,
    tokens: Tensor,
    cu_seqlens: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: LogLinearCache | None,
) -> TokenLayout:
    """tokens [B, T, ...] (ids or embeddings) give shape and device. Notes the padding in the cache."""
    rows, time = tokens.shape[:2]
    if time == 0:
        raise ValueError("input_ids must have at least one token in each row, got none")
    if cache is not None and cache.rows not in (None, rows):
        raise ValueError(f"past_key_values holds {cache.rows} sequences, got a batch of {rows}")
    past = 0 if cache is None else cache.get_seq_length()
    packing: Packing | None = None
    real_BT = new_columns(attention_mask, (rows, time), past)
    is_step = time == 1 and cache is not None and cache.has_states and not torch.is_grad_enabled()
    may_ask = not is_step or tokens.device.type == "cpu"  # a step does not wait for a device
    if real_BT is not None and may_ask and bool(real_BT.all()):
        real_BT = None
    if cu_seqlens is not None:
        if real_BT is not None:
            raise ValueError("attention_mask must not mark padding in a packed batch: leave the padding out")
        if cache is not None:
            raise ValueError("past_key_values cannot continue packed documents: pass them as rows of a padded batch")
        packing = Packing.from_cu_seqlens(cu_seqlens, time, config.conv_kernel)
    elif not is_step:
        check_positions(position_ids, real_BT)
        if real_BT is not None:
            packing = Packing.from_mask(real_BT, config.conv_kernel)
    active = real_BT[:, 0] if is_step and real_BT is not None else None
    assert config.layer_types is not None
    if "full_attention" not in config.layer_types:
        return TokenLayout(packing, None, is_step, active)
    columns_BS = real_BT if cache is None else cache.extend_real(real_BT, rows, time, tokens.device)
    column_T = past + torch.arange(time, device=tokens.device)
    if position_ids is None:
        position_ids = _positions(column_T, packing, columns_BS)
    assert config.attention_head_dim is not None
    cos, sin = rotary_tables(position_ids, config.attention_head_dim, config.rope_theta)
    lengths = None if cu_seqlens is None else of_any_length(cu_seqlens.diff().cpu())
    mask = _attention_mask(columns_BS, column_T, past)
    return TokenLayout(packing, AttentionContext(cos, sin, mask, lengths), is_step, active)


def _positions(column_T: Tensor, packing: Packing | None, columns_BS: Tensor | None) -> Tensor:
    """Each token's position in its own document or row, [1 or B, T]; padding does not count."""
    if columns_BS is not None:
        return (columns_BS.long().cumsum(1) - 1).clamp(min=0).index_select(1, column_T)
    return (column_T if packing is None else packing.position).unsqueeze(0)


def _attention_mask(columns_BS: Tensor | None, column_T: Tensor, past: int) -> Tensor | None:
    """[B or 1, 1, T, S] where a query may look; None where plain causal attention does (no past, or one new token)."""
    time = len(column_T)
    if columns_BS is None and (past == 0 or time == 1):
        return None
    query_T = column_T.unsqueeze(1)
    key_S = torch.arange(past + time if columns_BS is None else columns_BS.shape[1], device=column_T.device)
    causal_TS = key_S <= query_T
    if columns_BS is None:
        return causal_TS[None, None]
    own_TS = key_S == query_T  # padding looks at itself: no row of the softmax is empty
    return (causal_TS & columns_BS.unsqueeze(1) | own_TS).unsqueeze(1)

"""An error in the middle of a call leaves a cache that is refused, never one whose layers disagree."""

import copy

import pytest
import torch
from tiny_models import HYBRID, KINDS, TRANSFORMER, tokens

from loglinear.models import LogLinearCache

REFUSED = r"^past_key_values is not whole, because an earlier call with it raised an error midway: .* reset\(\)$"
CACHES = pytest.mark.parametrize("columns", [None, 20], ids=["dynamic", "static"])


class Lacking(RuntimeError):
    """Too little memory."""


def fail(*_):
    raise Lacking


@KINDS
@CACHES
@pytest.mark.parametrize("time", [1, 3])
@pytest.mark.parametrize("place", ["layers.0.mixer", "layers.0.mlp", "layers.1.mixer", "layers.1.mlp", "norm", "head"])
@torch.no_grad()
def test_a_cache_is_refused_after_an_error_anywhere(make_model, options, columns, time, place) -> None:
    model, ids = make_model(**options), tokens(2, 12)
    cache = LogLinearCache(model.config, columns)
    model(ids[:, :6], past_key_values=cache)
    hook = (model.lm_head if place == "head" else model.model.get_submodule(place)).register_forward_pre_hook(fail)
    with pytest.raises(Lacking):
        model(ids[:, 6 : 6 + time], past_key_values=cache)
    hook.remove()
    for use in (
        lambda: model(ids[:, 6 : 6 + time], past_key_values=cache),
        lambda: model.generate(ids, past_key_values=cache, max_new_tokens=2),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([1])),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.crop(-1),
        lambda: model(ids[:, 6 : 6 + time], past_key_values=copy.deepcopy(cache)),
    ):
        with pytest.raises(ValueError, match=REFUSED):
            use()
    cache.reset()
    again = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(again, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("options", [HYBRID, TRANSFORMER], ids=["hybrid", "transformer"])
@CACHES
@torch.no_grad()
def test_rows_that_were_half_moved_are_refused(make_model, options, columns, monkeypatch) -> None:
    model, ids = make_model(**options), tokens(2, 6)
    cache = LogLinearCache(model.config, columns)
    model(ids, past_key_values=cache)
    monkeypatch.setattr(cache.layers[1], "reorder_cache", fail)
    with pytest.raises(Lacking):
        cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=REFUSED):
        model(ids[:, :1], past_key_values=cache)


@KINDS
@CACHES
@torch.no_grad()
def test_a_refused_call_changes_nothing(make_model, options, columns) -> None:
    """A mistaken argument is no error midway: the cache goes on."""
    model, ids = make_model(**options), tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :2] = 0
    cache = LogLinearCache(model.config, columns)
    model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
    for mistake in (
        dict(position_ids=torch.zeros(2, 5, dtype=torch.long)),
        dict(attention_mask=mask[:, :4]),
        dict(labels=ids[:, :2]),
        dict(position_ids=torch.tensor([[7]])),
    ):
        with pytest.raises(ValueError):
            model(ids[:, 6:], past_key_values=cache, **mistake)
    rest = model(ids[:, 6:], past_key_values=cache).logits
    expected = model(ids, attention_mask=mask, use_cache=False).logits[:, 6:]
    torch.testing.assert_close(rest, expected)

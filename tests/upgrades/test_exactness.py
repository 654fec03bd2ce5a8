"""An upgrade changes no logit: every token, every family, dense, padded and packed, with and without a cache."""

import pytest
import torch
from transformers import DynamicCache

from tests.upgrades.tiny import MODELS, close, original, tokens, trained, upgraded, wide

FAMILIES = pytest.mark.parametrize("family", MODELS)
GREEDY = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
CHOICES = pytest.mark.parametrize(
    "choices",
    [{}, {"routing": "gram"}, {"radix": 4, "finest_block": 4}, {"routing": "gram", "radix": 4, "finest_block": 4}],
    ids=["levels", "routing", "radix", "both"],
)


@pytest.fixture(autouse=True)
def _float64():
    with wide(), torch.no_grad():
        yield


@FAMILIES
@CHOICES
def test_logits_of_every_token_are_the_original_s(family, choices):
    theirs, ids = original(family), tokens(2, 75)
    assert close(upgraded(theirs, **choices)(ids).logits, theirs(ids).logits)


@FAMILIES
def test_greedy_text_is_the_original_s(family):
    theirs, ids = original(family), tokens(3, 21)
    mask, has_limits = torch.ones_like(ids), family in ("nemotron_h", "zamba2")
    for arguments in (GREEDY, {**GREEDY, "num_beams": 3}):
        # With a cache transformers forgets the limits of the time step.
        right = theirs.generate(ids, attention_mask=mask, use_cache=not has_limits, **arguments)
        assert torch.equal(upgraded(theirs).generate(ids, attention_mask=mask, **arguments), right)


@FAMILIES
@CHOICES
def test_prefill_and_decode_equal_a_full_forward(family, choices):
    model, ids = trained(original(family), **choices), tokens(2, 40)
    right, cache, parts = model(ids, use_cache=False).logits, DynamicCache(config=model.config), []
    for piece in ids.split([5, 1, 1, 9, 1, 16, *[1] * 7], dim=1):
        parts.append(model(piece, past_key_values=cache).logits)
    assert close(torch.cat(parts, 1), right)
    assert not close(upgraded(original(family), **choices)(ids).logits, right)  # the new weights matter

"""transformers' caches with upgraded models: second turns, reorder, reset, rows, and what is refused."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from loglinear.models.history import OTHER_MASK
from tests.upgrades.tiny import MODELS, close, original, tokens, trained, wide

FAMILIES = pytest.mark.parametrize("family", MODELS)


@pytest.fixture(autouse=True)
def _float64():
    with wide(), torch.no_grad():
        yield


def named(model, cache) -> dict[str, DynamicCache]:
    """Return the cache under the name that `generate` passes to the model."""
    return {"cache_params" if "mamba" in type(model).__name__.lower() else "past_key_values": cache}


def started(model, ids, **arguments) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(ids, **named(model, cache), **arguments)
    return cache


@FAMILIES
def test_a_second_turn_continues_the_first(family):
    model, first, second = trained(original(family)), tokens(2, 11), tokens(2, 6, seed=2)
    greedy = dict(max_new_tokens=7, min_new_tokens=7, do_sample=False)
    cache = DynamicCache(config=model.config)
    text = model.generate(first, attention_mask=torch.ones_like(first), **named(model, cache), **greedy)
    whole = torch.cat([text, second], 1)
    mask = torch.ones_like(whole)
    again = model.generate(whole, attention_mask=mask, **named(model, cache), **greedy)
    assert torch.equal(again, model.generate(whole, attention_mask=mask, **greedy))


@FAMILIES
def test_rows_of_a_cache_can_be_reordered_repeated_and_selected(family):
    model, ids, more = trained(original(family)), tokens(3, 13), tokens(4, 5, seed=2)
    cache = started(model, ids)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 3, 5]))
    logits = model(more, past_key_values=cache).logits
    for row, origin in enumerate((2, 0, 0, 0)):
        alone = torch.cat([ids[origin], more[row]])[None]
        assert close(logits[row], model(alone).logits[0, 13:])


@FAMILIES
def test_a_copied_cache_is_independent(family):
    model, ids, more = trained(original(family)), tokens(2, 13), tokens(2, 5, seed=2)
    cache = started(model, ids)
    other = copy.deepcopy(cache)
    right = model(more, past_key_values=cache).logits
    assert close(model(more, past_key_values=other).logits, right)


@FAMILIES
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_reset_starts_again(family, static):
    model, ids, more = trained(original(family)), tokens(2, 13), tokens(3, 9, seed=2)
    new = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache(config=model.config)
    right = model(ids, past_key_values=new).logits
    assert new.layers[0].nbytes > 0
    new.reset()
    assert new.layers[0].nbytes == 0
    assert close(model(ids, past_key_values=new).logits, right)
    if not static:  # keys and values of a static cache keep their rows
        new.reset()
        assert close(model(more, past_key_values=new).logits, model(more).logits)


@FAMILIES
def test_static_caches_generate_the_same_text(family):
    model, ids = trained(original(family)), tokens(2, 9)
    greedy = dict(max_new_tokens=9, min_new_tokens=9, do_sample=False, attention_mask=torch.ones_like(ids))
    right = model.generate(ids, **greedy)
    assert torch.equal(model.generate(ids, cache_implementation="static", **greedy), right)


def test_crop_is_refused():
    model = trained(original("qwen3_next"))
    cache = started(model, tokens(1, 8))
    with pytest.raises(ValueError, match="cannot go back: start with a new cache"):
        cache.crop(-2)


def test_assisted_generation_is_refused():
    model, ids = trained(original("qwen3_next")), tokens(1, 8)
    with pytest.raises(ValueError):
        model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=5, do_sample=False)


def test_contradictions_of_a_state_are_refused():
    model, ids, more = trained(original("qwen3_next")), tokens(2, 8), tokens(2, 3, seed=2)
    mask = torch.ones(2, 11, dtype=torch.long)
    with pytest.raises(ValueError) as caught:
        model(more, past_key_values=started(model, ids), attention_mask=mask.index_fill(1, torch.tensor([1]), 0))
    assert str(caught.value) == OTHER_MASK
    with pytest.raises(ValueError, match="past_key_values holds 2 sequences, got a batch of 3"):
        model(tokens(3, 2), past_key_values=started(model, ids))


def test_a_text_that_contradicts_a_state_is_refused():
    model, ids = trained(original("qwen3_next")), tokens(2, 8)
    other = tokens(2, 12, seed=2)
    with pytest.raises(ValueError, match="input_ids must begin with the tokens that past_key_values has seen"):
        model.generate(
            other, attention_mask=torch.ones_like(other), past_key_values=started(model, ids), max_new_tokens=2
        )


def test_states_of_the_original_model_are_refused():
    theirs, ids = original("qwen3_next"), tokens(1, 8)
    with pytest.raises(ValueError, match="holds states of a model that was not upgraded"):
        trained(theirs)(ids, past_key_values=started(theirs, ids))


@FAMILIES
def test_the_original_model_refuses_states_of_the_upgraded_one(family):
    theirs, ids = original(family), tokens(1, 8)
    with pytest.raises(ValueError, match="past_key_values holds states of an upgraded model: start with a new cache"):
        theirs(ids, **named(theirs, started(trained(theirs), ids)))


@FAMILIES
@pytest.mark.parametrize("how", [{"prefill_chunk_size": 7}, {"use_cache": False}, {"embeddings": True}])
def test_other_ways_to_generate_write_the_same_text(family, how):
    model, ids = trained(original(family)), tokens(2, 23)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    greedy = dict(max_new_tokens=9, min_new_tokens=9, do_sample=False, attention_mask=mask)
    right = model.generate(ids, **greedy)[:, -9:]
    if "prefill_chunk_size" in how and family == "mamba2":
        with pytest.raises(
            ValueError, match="Cannot use prefill chunking without a cache"
        ):  # it looks for another name
            model.generate(ids, **greedy, **how)
        return
    if "embeddings" in how and family in ("bamba", "falcon_h1", "nemotron_h", "zamba2"):
        with pytest.raises(ValueError, match="doesn't have its forwarding implemented"):
            model.generate(inputs_embeds=model.get_input_embeddings()(ids), **greedy)
        return
    if "embeddings" in how:
        text = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **greedy)
    else:
        text = model.generate(ids, **greedy, **how)
    assert torch.equal(text[:, -9:], right)


def test_a_cache_of_another_model_is_refused():
    model = trained(original("qwen3_next"))
    with pytest.raises(ValueError, match="must have a linear layer 0, as DynamicCache.config=model.config. has"):
        model(tokens(1, 8), past_key_values=DynamicCache())


def test_a_call_that_failed_midway_leaves_a_cache_that_says_so():
    model, ids = trained(original("qwen3_next")), tokens(1, 8)
    cache = started(model, ids)
    fails = model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("full")))
    with pytest.raises(RuntimeError, match="full"):
        model(ids, past_key_values=cache)
    fails.remove()
    with pytest.raises(ValueError, match="past_key_values is not whole"):
        model(ids, past_key_values=cache)


def test_gradients_pass_no_cache():
    """With gradients enabled a step is the operator: the new tokens have gradients, the past is constant."""
    model, ids = trained(original("qwen3_next")), tokens(1, 8)
    cache = started(model, ids)
    right = model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
    with torch.enable_grad():
        logits = model(ids[:, :1], past_key_values=cache).logits
        logits.sum().backward()
    assert close(logits.detach(), right)
    assert model.model.layers[0].linear_attn.level_scales.proj.weight.grad.abs().max() > 0

"""Attention weights on request, and masks that say for each query where it may look."""

import pytest
import torch
from tiny_models import FULL, HYBRID, TRANSFORMER, tokens

from loglinear.models import LogLinearCache

T = 9
ATTENTIVE = pytest.mark.parametrize("options", [HYBRID, TRANSFORMER], ids=["hybrid", "transformer"])


def where(model, ids: torch.Tensor, arguments: dict) -> torch.Tensor:
    """[B, 1, T, T] the keys that change a query's output, by asking for each key."""
    embeds = model.get_input_embeddings()(ids)
    before = model(inputs_embeds=embeds, use_cache=False, **arguments).logits
    seen = torch.zeros(ids.shape[0], 1, T, T, dtype=torch.bool)
    for key in range(T):
        changed = embeds.clone()
        changed[:, key] += 1
        after = model(inputs_embeds=changed, use_cache=False, **arguments).logits
        seen[:, 0, :, key] = (after - before).abs().amax(-1) > 1e-12
    return seen


@ATTENTIVE
@pytest.mark.parametrize("kind", ["dense", "padded", "packed"])
def test_attention_weights_are_those_of_the_output(make_model, options, kind: str) -> None:
    model, ids = make_model(**options), tokens(1 if kind == "packed" else 2, T)
    mask = torch.ones_like(ids)
    mask[-1, :3] = 0
    arguments = {"dense": {}, "padded": {"attention_mask": mask}, "packed": {"cu_seqlens": torch.tensor([0, 2, 2, T])}}
    output = model(ids, output_attentions=True, **arguments[kind])
    real = mask.bool() if kind == "padded" else torch.ones_like(ids, dtype=torch.bool)
    expected = model(ids, **arguments[kind])
    torch.testing.assert_close(output.logits[real], expected.logits[real])
    assert expected.attentions is None and len(output.attentions) == model.config.layer_types.count(FULL)
    for weights in output.attentions:
        assert weights.shape == (ids.shape[0], 2, T, T)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    if options is TRANSFORMER:  # a linear layer in front lets tokens reach other queries
        looks = torch.stack([weights.sum(1, keepdim=True) > 0 for weights in output.attentions]).any(0)
        assert torch.equal(looks.transpose(1, 2)[real], where(model, ids, arguments[kind]).transpose(1, 2)[real])


@ATTENTIVE
@pytest.mark.parametrize("max_cache_len", [None, 12])
def test_attention_weights_of_pieces_are_those_of_the_whole(make_model, options, max_cache_len) -> None:
    model, ids = make_model(**options), tokens(2, T)
    expected = model(ids, output_attentions=True).attentions
    cache, seen = LogLinearCache(model.config, max_cache_len), 0
    with torch.no_grad():
        for piece in ids.split([5, 3, 1], 1):
            output = model(piece, past_key_values=cache, output_attentions=True)
            for weights, whole in zip(output.attentions, expected, strict=True):
                new = slice(seen, seen + piece.shape[1])
                torch.testing.assert_close(weights[..., : new.stop], whole[:, :, new, : new.stop])
                assert not weights[..., new.stop :].any()
            seen += piece.shape[1]


@ATTENTIVE
def test_gradients_reach_hidden_states_and_attention_weights(make_model, options) -> None:
    model = make_model(**options)
    output = model(tokens(2, T), output_hidden_states=True, output_attentions=True)
    kept = [output.hidden_states[0], *output.attentions]
    for x in kept:
        x.retain_grad()
    output.logits.square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in kept)


def test_the_configuration_may_ask_for_attention_weights(make_model) -> None:
    model, ids = make_model(**TRANSFORMER), tokens(1, T)
    model.config._attn_implementation = "eager"  # transformers' configurations allow it to such models alone
    model.config.output_attentions = True
    assert len(model(ids).attentions) == 2
    tuple_output, output = model(ids, return_dict=False, use_cache=False), model(ids, use_cache=False)
    for ours, theirs in zip(tuple_output, output.to_tuple(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_generate_returns_attention_weights_of_every_step(make_model) -> None:
    model = make_model(**HYBRID)
    options = dict(max_new_tokens=3, eos_token_id=None, return_dict_in_generate=True, output_attentions=True)
    output = model.generate(tokens(2, T), **options)
    assert [step[0].shape for step in output.attentions] == [(2, 2, T, T), (2, 2, 1, T + 1), (2, 2, 1, T + 2)]


def test_a_model_without_attention_refuses_to_return_its_weights(make_model) -> None:
    with pytest.raises(ValueError, match="^output_attentions needs full-attention layers, and this model has linear"):
        make_model()(tokens(1, T), output_attentions=True)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64, torch.float32])
def test_a_mask_for_each_query_packs_texts_with_one_prefix(make_model, dtype, cached) -> None:
    """Three texts that begin alike, in one row: prefix, and the last tokens of each."""
    model, ids = make_model(**TRANSFORMER), tokens(1, 4)
    ends = tokens(3, 1, seed=5)
    alone = model(torch.cat([ids[:, :3].expand(3, -1), ends], 1)).logits[:, -1]
    looks = torch.ones(6, 6).tril().bool()
    looks[3:, 3:] = torch.eye(3).bool()
    mask = looks if dtype == torch.bool else (~looks).to(dtype) * torch.finfo(dtype).min
    row = torch.cat([ids[:, :3], ends.T], 1)
    positions = torch.tensor([[0, 1, 2, 3, 3, 3]])
    if cached:
        cache = LogLinearCache(model.config)
        model(row[:, :3], past_key_values=cache)
        together = model(
            row[:, 3:], past_key_values=cache, attention_mask=mask[None, None, 3:], position_ids=positions[:, 3:]
        ).logits[0]
    else:
        together = model(row, attention_mask=mask[None, None], position_ids=positions).logits[0, 3:]
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(
    ("options", "mask", "arguments", "message"),
    [
        (HYBRID, torch.ones(1, 1, T, T).bool(), {}, r"attention_mask \[B, 1, T, S\] needs a model of full-attention"),
        ({}, torch.ones(1, 1, T, T).bool(), {}, r"attention_mask \[B, 1, T, S\] needs a model of full-attention"),
        (TRANSFORMER, torch.ones(1, 1, T, 8).bool(), {}, r"must have shape \[1, 1, 9, 9\], got \[1, 1, 9, 8\]"),
        (TRANSFORMER, torch.ones(1, 1, T, T), {}, "must be boolean, or 0 and negative numbers .*, got other values"),
        (TRANSFORMER, torch.ones(1, 1, T, T).long(), {}, "must be boolean, .*, got torch.int64"),
        (TRANSFORMER, torch.ones(1, 1, T, T).bool(), {"cu_seqlens": torch.tensor([0, 9])}, "exclude each other"),
        (TRANSFORMER, torch.ones(1, T, T), {}, r"attention_mask must have shape \[1, 9\]"),
    ],
)
def test_masks_that_do_not_fit_are_one_clear_line(make_model, options, mask, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**options)(tokens(1, T), attention_mask=mask, **arguments)

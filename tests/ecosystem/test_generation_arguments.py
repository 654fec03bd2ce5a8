"""Decisions of transformers about `generate` by the names of a model's arguments."""

import inspect

import pytest
import torch

from loglinear.models import ByteTokenizer, LogLinearCache, LogLinearConfig, LogLinearForCausalLM, LogLinearModel
from tests.ecosystem.tiny import KINDS, tiny_model

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}
PROMPT = torch.tensor([list(b"some text"), list(b"and other")])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", [None, "static"])
def test_embeddings_continue_as_their_tokens_do(kind, cache):
    model = tiny_model(**KINDS[kind])
    embeddings = model.get_input_embeddings()(PROMPT)
    options = {**GREEDY, "cache_implementation": cache, "disable_compile": True}
    expected = model.generate(PROMPT, **options)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **options), expected[:, PROMPT.shape[1] :])
    assert torch.equal(model.generate(PROMPT, inputs_embeds=embeddings, **options), expected)
    padded = torch.cat([embeddings.new_ones(2, 3, embeddings.shape[2]), embeddings], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * PROMPT.shape[1]] * 2)
    actual = model.generate(inputs_embeds=padded, attention_mask=mask, **options)
    assert torch.equal(actual, expected[:, PROMPT.shape[1] :])


@pytest.mark.parametrize("stop", ["é", "\n", "ab"])
def test_stop_strings_end_a_text_whatever_bytes_they_have(stop):
    model, tokenizer = tiny_model(), ByteTokenizer()
    model.lm_head = Likeliest(list(b"xyz" + stop.encode() + b"xyz"))
    ids = torch.tensor([[97]])
    text = model.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **{**GREEDY, "max_new_tokens": 9})
    assert tokenizer.decode(text[0, 1:]) == "xyz" + stop


class Likeliest(torch.nn.Module):
    """In the place of a head: one given token after the other."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = iter(tokens)

    def forward(self, hidden):
        return torch.nn.functional.one_hot(torch.tensor(next(self.tokens)), 264).float().expand(*hidden.shape[:2], 264)


@pytest.mark.parametrize("kind", [LogLinearConfig, LogLinearCache, LogLinearForCausalLM, LogLinearModel, ByteTokenizer])
def test_no_override_hides_an_argument_that_others_look_for(kind):
    """Many tools ask `inspect.signature` whether a method takes an argument; `*args, **kwargs` hide all of them."""
    ours = [base for base in kind.__mro__ if base.__module__.startswith("loglinear.")]
    theirs = [base for base in kind.__mro__ if base.__module__.startswith("transformers.")]
    compared = 0
    for name in {name for base in ours for name, value in vars(base).items() if inspect.isfunction(value)}:
        overridden = next((vars(base)[name] for base in theirs if inspect.isfunction(vars(base).get(name))), None)
        if overridden is None or name.startswith("_") or name == "forward":
            continue
        named = [p.name for p in inspect.signature(overridden).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        assert set(named) <= set(inspect.signature(getattr(kind, name)).parameters), name
        compared += 1
    assert compared

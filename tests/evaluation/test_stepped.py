"""Answers that are read in decode steps get the scores of one forward pass, unless steps read few buckets."""

import numpy as np
import pytest
import torch

import loglinear
from loglinear.evaluation.needle import answer_hits, evaluate_needle, evaluate_sets, example_sets
from loglinear.evaluation.stepped import stepped_hits
from loglinear.models import ByteTokenizer, LogLinearForCausalLM, set_decode_top_k
from tests.training.tiny import tiny_recipe
from tests.upgrades import tiny

ROUTED = {"routing": "gram", "radix": 4, "finest_block": 4, "num_levels": 10}
LINEAR, FULL = "linear_attention", "full_attention"
KINDS = {
    "lambda": {},
    "linear": {"num_levels": 1},
    "routed": ROUTED,
    "hybrid": {**ROUTED, "layer_types": [LINEAR, FULL]},
    "delta_rule": {**ROUTED, "variant": "gated_delta_net"},
}


def model_of(**options) -> LogLinearForCausalLM:
    torch.manual_seed(0)
    recipe = tiny_recipe(".")
    sizes = {**recipe.model, "num_hidden_layers": 2, "vocab_size": 300, **options}
    return random_weights(LogLinearForCausalLM(tiny_recipe(".", model=sizes).model_config()))


def random_weights(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def pairs(seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Prompts and answers of several lengths."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(3, 90, p), rng.integers(3, 90, a)) for p, a in ((2, 5), (40, 1), (33, 9), (100, 4), (3, 30))]


def likeliest(model, examples):
    """The same prompts with answers whose odd tokens are the model's own choices, as greedy decoding makes them."""
    made = []
    for prompt, answer in examples:
        ids = torch.from_numpy(prompt)[None]
        for place, token in enumerate(answer.tolist()):
            best = int(model(ids, use_cache=False).logits[0, -1].argmax())
            ids = torch.cat([ids, torch.tensor([[best if place % 2 else token]])], 1)
        made.append((prompt, ids[0, len(prompt) :].numpy()))
    return made


@torch.no_grad()
def check_equal(model) -> None:
    examples = likeliest(model, pairs())
    expected, found = answer_hits(model, examples), stepped_hits(model, examples)
    assert all(np.array_equal(a, e) for a, e in zip(found, expected, strict=True))
    assert all(hits[1::2].all() for hits in found) and not all(hits.all() for hits in found)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_steps_find_what_one_pass_finds(options) -> None:
    check_equal(model_of(**options))


@pytest.mark.parametrize("kind", ["mamba2", "qwen3_5", "bamba", "zamba2"])
def test_upgraded_models_read_in_steps_too(kind) -> None:
    torch.manual_seed(0)
    model = getattr(tiny, kind)()
    loglinear.upgrade(model, num_levels=10, finest_block=4, radix=4, routing="gram", chunk_size=4)
    check_equal(random_weights(model))
    set_decode_top_k(model, 9)
    check_equal(model)


def test_few_buckets_change_the_answers_and_all_of_them_do_not() -> None:
    model = model_of(**ROUTED)
    with torch.no_grad():
        examples = likeliest(model, pairs(1))
        expected = np.concatenate(answer_hits(model, examples))
        for top_k, equal in ((9, True), (1, False)):
            set_decode_top_k(model, top_k)
            assert np.array_equal(np.concatenate(stepped_hits(model, examples)), expected) == equal
            assert np.array_equal(np.concatenate(answer_hits(model, examples)), expected)  # one pass reads all


def test_needles_are_scored_in_steps() -> None:
    model, tokenizer = model_of(**ROUTED), ByteTokenizer()
    sets = example_sets(tokenizer, (), lengths=[950, 1000], count=3, tasks=["multiquery"])
    examples = sets["multiquery", 950]
    scores = [evaluate_needle(model, tokenizer, examples, decode=d, row_tokens=2000, label=None) for d in (False, True)]
    assert scores[0].to_dict() == scores[1].to_dict()
    assert evaluate_sets(model, tokenizer, sets, decode=True) == evaluate_sets(model, tokenizer, sets)

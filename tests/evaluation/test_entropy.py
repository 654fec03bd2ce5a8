"""Entropies of sampled tokens are those of the model's distributions, and the marked tokens are the right ones."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

from loglinear.evaluation.entropy import SampledAnswer, SampledToken, entropy, label, sample_with_entropy, token_texts
from loglinear.models import ByteTokenizer, LogLinearForCausalLM, set_decode_top_k
from tests.training.tiny import tiny_recipe
from tests.upgrades.tiny import original, trained

PROMPT = "def main"


def answer_of(*entropies, quantile=0.2):
    tokens = tuple(SampledToken(97, "a", float(value), -1.0) for value in entropies)
    return SampledAnswer(PROMPT, tokens, quantile)


def lively(**changes):
    """A model whose distributions differ from token to token."""
    sizes = {**tiny_recipe(".").model, "tie_word_embeddings": False, **changes}
    torch.manual_seed(0)
    model = LogLinearForCausalLM(dataclasses.replace(tiny_recipe("."), model=sizes).model_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture
def model():
    return lively()


@pytest.mark.parametrize("size", [1, 2, 3, 257])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_entropy_is_that_of_the_distribution_in_float64(size, scale):
    logits = scale * torch.randn(5, size)
    expected = Categorical(logits=logits.double()).entropy()
    torch.testing.assert_close(entropy(logits).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy(logits.double()), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 7, 50_257])
def test_equal_logits_have_the_logarithm_of_their_number(size):
    for constant in (-1e4, 0.0, 1e4):
        assert float(entropy(torch.full((size,), constant))) == pytest.approx(math.log(size), abs=1e-5)


def test_logits_of_minus_infinity_add_nothing():
    logits = torch.tensor([-math.inf, 0.0, 0.0, -math.inf])
    assert float(entropy(logits)) == pytest.approx(math.log(2), rel=1e-6)


def test_half_precision_is_summed_in_float32():
    logits = torch.randn(3, 5000).bfloat16()
    expected = Categorical(logits=logits.double()).entropy()
    torch.testing.assert_close(entropy(logits).double(), expected, rtol=1e-5, atol=1e-6)


def expected_of(model, answer, prompt=PROMPT):
    """The entropies and log probabilities of an answer from one forward pass over all of it, in float64."""
    before = [256, *prompt.encode()]
    ids = torch.tensor([[*before, *(token.id for token in answer.tokens)]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(before) - 1 : -1].double()
    distribution = Categorical(logits=logits)
    return distribution.entropy().numpy(), distribution.log_prob(ids[0, len(before) :]).numpy()


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_steps_agree_with_one_forward_pass_at_every_temperature(model, temperature):
    answer = sample_with_entropy(model, ByteTokenizer(), PROMPT, max_new_tokens=40, temperature=temperature)
    entropies, log_probabilities = expected_of(model, answer)
    assert np.ptp(entropies) > 0.1
    np.testing.assert_allclose(answer.entropies, entropies, atol=2e-4)
    drawn = [token.log_probability for token in answer.tokens]
    np.testing.assert_allclose(drawn, log_probabilities, atol=2e-4)
    assert [token.probability for token in answer.tokens] == pytest.approx(np.exp(log_probabilities), abs=2e-4)


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_shortest_answers_are_whole(model, tokens):
    answer = sample_with_entropy(model, ByteTokenizer(), PROMPT, max_new_tokens=tokens)
    entropies, log_probabilities = expected_of(model, answer)
    assert len(answer.tokens) == tokens
    np.testing.assert_allclose([token.entropy for token in answer.tokens], entropies, atol=2e-4)
    np.testing.assert_allclose([token.log_probability for token in answer.tokens], log_probabilities, atol=2e-4)


def test_upgraded_models_of_transformers_have_entropies_too():
    model = trained(original("qwen3_5", torch.float32, vocab_size=264))
    answer = sample_with_entropy(model, ByteTokenizer(), PROMPT, max_new_tokens=12)
    np.testing.assert_allclose(answer.entropies, expected_of(model, answer)[0], atol=2e-4)


def test_a_models_steps_are_measured_with_the_buckets_that_they_read():
    model = lively(routing="gram")
    options = dict(max_new_tokens=30, seed=3)
    whole = sample_with_entropy(model, ByteTokenizer(), PROMPT * 4, **options)
    set_decode_top_k(model, 1)
    few = sample_with_entropy(model, ByteTokenizer(), PROMPT * 4, **options)
    np.testing.assert_allclose(whole.entropies, expected_of(model, whole, PROMPT * 4)[0], atol=2e-4)
    assert few.entropies[0] == pytest.approx(whole.entropies[0], abs=1e-5)  # the prompt reads all buckets
    assert np.abs(few.entropies - expected_of(model, few, PROMPT * 4)[0]).max() > 1e-2


def test_the_end_of_the_answer_is_a_token_of_it(model):
    end = torch.tensor([257])
    model.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits.index_fill(-1, end, 50))
    answer = sample_with_entropy(model, ByteTokenizer(), PROMPT, max_new_tokens=9)
    assert [(token.id, token.text) for token in answer.tokens] == [(257, "<eos>")]
    assert answer.tokens[0].entropy < 1e-6 and answer.forking() == [0]


def test_a_seed_decides_the_answer(model):
    first, again, other = (
        sample_with_entropy(model, ByteTokenizer(), PROMPT, max_new_tokens=20, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.to_dict()["answer"] != other.to_dict()["answer"]


@pytest.mark.parametrize(
    ("entropies", "quantile", "marked"),
    [
        ([1, 2, 3, 4, 5], 0.2, [4]),
        ([5, 1, 4, 2, 3], 0.4, [0, 2]),
        ([0, 0, 0, 0, 1], 0.2, [4]),
        ([0, 1, 1, 1, 1], 0.2, [1, 2, 3, 4]),
        ([3, 3, 3], 0.2, [0, 1, 2]),
        ([0, 0, 0], 0.2, [0, 1, 2]),
        ([2, 3, 1, 3], 0.0, [1, 3]),
        ([2, 3, 1, 3], 1.0, [1, 3, 0, 2]),
        ([7], 0.2, [0]),
    ],
)
def test_the_highest_entropies_are_marked_with_their_ties(entropies, quantile, marked):
    answer = answer_of(*entropies, quantile=quantile)
    assert answer.forking() == marked
    assert np.flatnonzero(answer.is_forking).tolist() == sorted(marked)
    assert answer.threshold == pytest.approx(float(torch.tensor(entropies).double().quantile(1 - quantile)))
    assert [token["forking"] for token in answer.to_dict()["tokens"]] == answer.is_forking.tolist()


@pytest.mark.parametrize("tokens", [5, 64, 100, 1000])
def test_a_fifth_of_different_entropies_is_marked(tokens):
    marked = len(answer_of(*np.random.default_rng(0).permutation(tokens)).forking())
    assert tokens / 5 <= marked <= tokens / 5 + 1


@pytest.mark.parametrize("value", [-0.1, 0, 1.1, float("nan")])
def test_a_quantile_that_is_no_share_is_named(model, value):
    with pytest.raises(ValueError, match=f"quantile must be more than 0 and at most 1, got {value}"):
        sample_with_entropy(model, ByteTokenizer(), PROMPT, max_new_tokens=1, quantile=value)


def test_bits_are_nats_over_the_logarithm_of_two():
    assert answer_of(math.log(8)).tokens[0].bits == pytest.approx(3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"ab", ["a", "b"]),
        ("é€".encode(), ["é", "", "€", "", ""]),
        ("a\U0001f600b".encode(), ["a", "\U0001f600", "", "", "", "b"]),
        (b"\xffa\xc3", ["\ufffd", "a", "\ufffd"]),
        (b"\xe2\x82a", ["\ufffd", "", "a"]),
        (b"\xe2\x82", ["\ufffd", ""]),
    ],
)
def test_texts_of_bytes_are_whole_characters(text, expected):
    assert token_texts(ByteTokenizer(), b"before ", text) == expected


def test_texts_of_random_bytes_join_to_the_text_of_all():
    generator = np.random.default_rng(0)
    for length in (1, 2, 3, 17, 64):
        ids = generator.integers(0, 259, length).tolist()
        assert "".join(token_texts(ByteTokenizer(), [256, 97], ids)) == ByteTokenizer().decode(ids)


def test_a_prefix_with_two_marks_for_half_a_character_takes_nothing_of_the_next():
    """Some tokenizers decode every byte of half a character to a mark of its own, so a longer prefix may be shorter."""

    class Marks:
        def decode(self, ids, **_):
            try:
                return bytes(ids).decode()
            except UnicodeDecodeError as error:
                return bytes(ids)[: error.start].decode() + "\ufffd" * (len(ids) - error.start)

    assert token_texts(Marks(), b"a", "€b".encode()) == ["€", "", "", "b"]


def test_nothing_that_is_shown_is_invisible():
    assert label("a\n\n") == "a\u23ce\u23ce"
    assert label("\x1b[31m\t\r\0\x7f") == "\u241b[31m\u21e5\u240d\u2400\u2421"
    assert label("") == "\u00b7" and label(" a ") == "\u2423a\u2423"
    assert label("\x85\u2028\u202e\ufeff") == "\ufffd" * 4
    assert label("\U0001f469\u200d\U0001f469") == "\U0001f469\u200d\U0001f469"

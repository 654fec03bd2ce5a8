import pytest
import torch

from loglinear.evaluation import sample
from loglinear.models import ByteTokenizer, LogLinearForCausalLM
from tests.training.tiny import tiny_recipe


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    return LogLinearForCausalLM(tiny_recipe(tmp_path).model_config()).eval()


def test_seed_decides_the_sample(model):
    first, again, other = (
        sample(model, ByteTokenizer(), "abc", max_new_tokens=40, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert first.text == again.text != other.text
    assert first.text.startswith("abc") and first.state_bytes > 0


def test_greedy_takes_the_likeliest_token_after_a_documents_beginning(model):
    tokenizer = ByteTokenizer(add_bos_token=True)
    ids = tokenizer("abc", return_tensors="pt")["input_ids"]
    likeliest = int(model(ids).logits[0, -1].argmax())
    result = sample(model, ByteTokenizer(), "abc", max_new_tokens=1, temperature=0.0)
    assert result.tokens == 1
    assert result.text == tokenizer.decode([*ids[0].tolist(), likeliest], skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-7])
def test_vanishing_temperature_is_greedy(model, temperature):
    greedy, almost = (
        sample(model, ByteTokenizer(), "abc", max_new_tokens=8, temperature=value) for value in (0.0, temperature)
    )
    assert almost.text == greedy.text


def test_empty_prompt_begins_with_bos(model):
    assert sample(model, ByteTokenizer(), "", max_new_tokens=3, temperature=1.0).tokens >= 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", float("inf")), ("temperature", float("nan")), ("temperature", -1.0), ("top_p", float("nan"))]
    + [("top_p", 1.5), ("top_p", 0), ("top_k", -1), ("max_new_tokens", 0), ("seed", 2**32), ("seed", -1)],
)
def test_values_that_cannot_work_are_named(model, name, value):
    with pytest.raises(ValueError, match=f"{name} must .*, got {value}"):
        sample(model, ByteTokenizer(), "abc", **{"max_new_tokens": 1, "temperature": 1.0, name: value})

"""Padded forward passes of our models, of upgraded models, and of transformers' own."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Mamba2Config, Mamba2ForCausalLM

from loglinear.evaluation.padded import _batches, padded_losses
from loglinear.models import LogLinearForCausalLM
from tests.training.tiny import tiny_recipe
from tests.upgrades.tiny import original, upgraded

LENGTHS = [31, 2, 17, 64, 15, 16, 33, 3]


def model_of(kind):
    torch.manual_seed(0)
    if kind == "ours":
        return LogLinearForCausalLM(tiny_recipe(".").model_config()).eval()
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=90, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    if kind == "mamba2":
        sizes = dict(num_heads=4, head_dim=16, n_groups=2, state_size=8, chunk_size=16)
        return Mamba2ForCausalLM(Mamba2Config(vocab_size=90, hidden_size=32, num_hidden_layers=2, **sizes)).eval()
    return upgraded(original(kind.removeprefix("upgraded "), torch.float32)).eval()


@pytest.fixture(scope="module", params=["ours", "gpt2", "mamba2", "upgraded qwen3_5", "upgraded zamba2"])
def model(request):
    return model_of(request.param)


@pytest.fixture
def sequences():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 90, length) for length in LENGTHS]


@torch.no_grad()
def test_losses_are_those_of_each_sequence_alone(model, sequences):
    together = padded_losses(model, sequences)
    assert [len(nats_T) for nats_T in together] == [length - 1 for length in LENGTHS]
    for sequence, nats_T in zip(sequences, together, strict=True):
        ids = torch.from_numpy(sequence)[None]
        log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
        alone = -log_p[torch.arange(len(sequence) - 1), ids[0, 1:]].numpy()
        assert nats_T.dtype == np.float64
        np.testing.assert_allclose(nats_T, alone, rtol=1e-4, atol=1e-5)


def test_losses_do_not_depend_on_the_batches(model, sequences):
    for batch_tokens in (1, 70):
        for one, other in zip(
            padded_losses(model, sequences),
            padded_losses(model, sequences, batch_tokens=batch_tokens),
            strict=True,
        ):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_batches_take_every_sequence_once_and_fit():
    for budget in (1, 40, 64, 100, 10_000):
        batches = list(_batches(LENGTHS, budget))
        assert sorted(index for batch in batches for index in batch) == list(range(len(LENGTHS)))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(LENGTHS[index] for index in batch) <= budget
    assert len(list(_batches(LENGTHS, 10_000))) == 1


def test_softmax_of_a_16_bit_model_is_float32(sequences):
    """Logits of the model as they are, whatever their dtype; a bfloat16 softmax would err by 0.4 %."""
    model = model_of("gpt2").to(torch.bfloat16)
    (nats_T,) = padded_losses(model, sequences[3:4])
    ids = torch.from_numpy(sequences[3])[None]
    with torch.no_grad():
        log_p = model(ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].double().log_softmax(-1)
    np.testing.assert_allclose(nats_T, -log_p[torch.arange(63), ids[0, 1:]].numpy(), rtol=1e-6)

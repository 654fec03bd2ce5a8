"""Packed forward passes of upgraded models, which are transformers' own."""

import pytest
import torch

from loglinear.evaluation.packed import logits_of, read
from tests.upgrades.tiny import LANGUAGE_MODELS, original, tokens, trained


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_of_hidden_states_are_the_model_s(family, dtype):
    """Also if the family has a factor outside its head, or float32 hidden states in a 16-bit model."""
    model, ids = trained(original(family, dtype)), tokens(2, 20)
    hidden, targets = read(model, [row.numpy() for row in ids])
    right = model(ids).logits.float().flatten(0, 1)[:-1]
    same_sequence = torch.arange(39) != 19
    assert torch.equal(targets[same_sequence], ids.flatten()[1:][same_sequence])
    bound = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]  # the packed pass has another order of sums
    error = (logits_of(model, hidden) - right).pow(2).mean().sqrt()
    assert error <= bound * right.pow(2).mean().sqrt()

"""In float32 and bfloat16 an upgraded model is as close to the exact logits as the original model."""

import copy

import pytest
import torch
from transformers import DynamicCache

import loglinear
from tests.upgrades.tiny import MODELS, original, tokens, trained, upgraded, wide


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_error_is_at_most_twice_the_original_s(family, dtype):
    """The root mean square over all tokens of 4 rows, against float64; measured: 0.4 to 1.4 times the original's."""
    theirs, ids = original(family, dtype), tokens(4, 75)
    with wide():
        right = copy.deepcopy(theirs).double()(ids).logits
    errors = [(model(ids).logits.double() - right).pow(2).mean().sqrt().item() for model in (upgraded(theirs), theirs)]
    assert errors[0] <= 2 * errors[1]


SIXTEEN_BITS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@SIXTEEN_BITS
@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("routing", [None, "gram"])
def test_new_parameters_of_a_16_bit_model_are_float32(dtype, routing, freeze):
    model = upgraded(original("qwen3_next", dtype), routing=routing, freeze=freeze)
    new = loglinear.new_parameters(model)
    assert {p.dtype for p in new.values()} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if name not in new} == {dtype}


@SIXTEEN_BITS
def test_a_small_step_of_the_optimiser_moves_every_new_parameter(dtype):
    """AdamW moves a weight by the learning rate: 1e-5, less than half the distance of two bfloat16 numbers near 0.5."""
    model, ids = upgraded(original("qwen3_5", torch.float32).to(dtype)), tokens(2, 30)
    new = loglinear.new_parameters(model)
    with torch.no_grad():
        for parameter in new.values():
            parameter.fill_(0.5)
    optimizer = torch.optim.AdamW(new.values(), lr=1e-5, eps=1e-30, weight_decay=0.0)
    model(ids, labels=ids, use_cache=False).loss.float().backward()
    optimizer.step()
    for parameter in new.values():
        moved = (parameter.detach() - 0.5).abs()[parameter.grad != 0]
        assert len(moved) and torch.allclose(moved, torch.tensor(1e-5), rtol=0.02)


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_sixteen_bit_layers_decode_as_exactly_as_they_prefill(family):
    """Float32 weights beside 16-bit hidden states. The error of the median token; measured: 0.8 to 1.3 times."""
    model, ids = trained(original(family, torch.bfloat16), routing="gram"), tokens(2, 40)
    whole, cache = model(ids, use_cache=False).logits, DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([13, *[1] * 27], dim=1)]
    with wide():
        right = copy.deepcopy(model).double()(ids, use_cache=False).logits
    errors = [(logits.double() - right).norm(dim=-1).median() for logits in (torch.cat(pieces, 1), whole)]
    assert errors[0] <= 2 * errors[1]

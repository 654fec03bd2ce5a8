"""Errors below float64 against the float64 definition, by the errors that the same numbers make in plain torch."""

import pytest
import torch

from tests.ops.operators import OPERATORS, excess, gradients, parts, random_loss, relative_error

# times the error of the float32 recurrence: at most 2.3; the decay's gradient in chunks of 256, the difference of sums
# over a chunk, at most 9
FACTOR, LONG_DECAY_FACTOR = 4, 16

pytestmark = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)


def exact(operator, inputs):
    """The float64 result, and gradients, of inputs that were already rounded."""
    double = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    return double, operator(double, chunk_size=16).output


def check_float32(operator, inputs, chunk_size):
    """Output and every gradient are about as near to float64 as the recurrence in float32 is, token by token."""
    double = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    weights, results = None, []
    for x, impl in ((inputs, "torch"), (inputs, "reference"), (double, "torch")):
        output = operator(x, chunk_size=chunk_size, impl=impl).output
        weights = weights or random_loss(output)
        results.append([output, *gradients([output], tuple(w.to(x["q"].dtype) for w in weights), list(x.values()))])
        assert output.dtype == x["q"].dtype
    for name, actual, twin, exact in zip(["output", *inputs], *results, strict=True):
        is_long = chunk_size > 64 and name == "log_decay"
        assert excess(actual, twin, exact) <= (LONG_DECAY_FACTOR if is_long else FACTOR), name


@pytest.mark.parametrize("levels", [1, 6, 10])
def test_float32_error(operator, levels):
    check_float32(operator, operator.inputs(T=300, K=16, V=8, L=levels, dtype=torch.float32), chunk_size=16)


@pytest.mark.parametrize("chunk_size", [16, 256])
@pytest.mark.parametrize("reset", [-5.0, -80.0])
def test_float32_error_with_strong_decays_in_between(operator, reset, chunk_size):
    """Half of the tokens reset the state: no decay may be a difference of sums over the resets."""
    inputs = operator.inputs(T=300, K=16, V=8, L=8, dtype=torch.float32)
    with torch.no_grad():
        inputs["log_decay"][torch.rand(2, 300, 4) < 0.5] = reset
    check_float32(operator, inputs, chunk_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_cost_one_rounding(operator, dtype):
    """Everything between the inputs and the output is float32, so the error is that of rounding the exact output."""
    inputs = operator.inputs(T=100, K=16, V=8, dtype=dtype)
    for name in ("log_decay", "beta", "level_scales"):
        if name in inputs:
            inputs[name] = inputs[name].detach().float().requires_grad_()
    double, expected = exact(operator, inputs)
    result = operator(inputs, chunk_size=16, output_final_state=True)
    rounding = relative_error(expected.to(dtype), expected)
    assert result.output.dtype == dtype
    assert relative_error(result.output, expected) < 1.02 * rounding
    weights = random_loss(result.output)
    actual = gradients([result.output], weights, list(inputs.values()))
    reference = gradients([expected], tuple(w.double() for w in weights), list(double.values()))
    for name, a, e in zip(inputs, actual, reference, strict=True):
        assert a.dtype == inputs[name].dtype
        assert relative_error(a, e) < 1.02 * relative_error(e.to(a.dtype), e) + 6e-7, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_states_are_float32_or_float64(operator, dtype):
    result = operator(operator.inputs(dtype=dtype), chunk_size=4, output_final_state=True)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {part.dtype for part in parts(result.final_state).values()} == {expected}
    following = operator(operator.inputs(T=1, dtype=dtype), chunk_size=4, initial_state=result.final_state)
    assert following.output.dtype == dtype


def test_autocast_does_not_reach_the_operator(operator):
    """Inside bf16 autocast a float32 call, forward and backward, gives the bits that it gives outside."""
    inputs = operator.inputs(T=45, dtype=torch.float32)
    leaves = list(inputs.values())

    def call():
        output = operator(inputs, chunk_size=8).output
        return output, *torch.autograd.grad(output, leaves, torch.ones_like(output))

    outside = call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = call()
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))

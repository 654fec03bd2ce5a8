"""Error budgets below float64, measured against the float64 definition."""

import pytest
import torch

from tests.ops.operators import OPERATORS, gradients, parts, random_loss, relative_error

pytestmark = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)


def exact(operator, inputs):
    """The float64 result, and gradients, of inputs that were already rounded."""
    double = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    return double, operator(double, chunk_size=16).output


# float32, measured over five seeds: at most 2.3e-7 (scalar gate) and 2.9e-7 (delta rule), output and every gradient
@pytest.mark.parametrize("levels", [1, 6, 10])
def test_float32_error(operator, levels):
    budget = 6e-7
    inputs = operator.inputs(T=300, K=16, V=8, L=levels, dtype=torch.float32)
    double, expected = exact(operator, inputs)
    output = operator(inputs, chunk_size=16).output
    assert output.dtype == torch.float32
    assert relative_error(output, expected) < budget
    weights = random_loss(output)
    actual = gradients([output], weights, list(inputs.values()))
    reference = gradients([expected], tuple(w.double() for w in weights), list(double.values()))
    for name, a, e in zip(inputs, actual, reference, strict=True):
        assert relative_error(a, e) < budget, name


@pytest.mark.parametrize("chunk_size", [16, 256])
@pytest.mark.parametrize("reset", [-5.0, -80.0])
def test_float32_error_with_strong_decays_in_between(operator, reset, chunk_size):
    """Half of the tokens reset the state: no decay may be a difference of sums over the resets."""
    inputs = operator.inputs(T=512, K=16, V=8, L=8, dtype=torch.float32)
    with torch.no_grad():
        inputs["log_decay"][torch.rand(2, 512, 4) < 0.5] = reset
    double = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    output, expected = (operator(x, chunk_size=chunk_size).output for x in (inputs, double))
    assert relative_error(output, expected) < 6e-7
    weights = random_loss(output)
    actual = gradients([output], weights, list(inputs.values()))
    reference = gradients([expected], tuple(w.double() for w in weights), list(double.values()))
    for name, a, e in zip(inputs, actual, reference, strict=True):
        assert relative_error(a, e) < 1.2e-6, name


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

"""The same operators on a CUDA device: exact in float64, within the float32 budget, the same bits twice."""

import pytest
import torch

from tests.ops.operators import OPERATORS, gradients, parts, random_loss, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)]


def run(operator, inputs, weights=None, **options):
    """Output, state and every gradient of one call, and the loss weights used."""
    out = operator(inputs, output_final_state=True, **options)
    results = [out.output, *parts(out.final_state).values()]
    weights = weights or random_loss(*results)
    return [*results, *gradients(results, weights, list(inputs.values()))], weights


def on(device, inputs, dtype=None):
    return {name: x.detach().to(device, dtype).requires_grad_() for name, x in inputs.items()}


@pytest.mark.parametrize("levels", [1, 4, 12])
@pytest.mark.parametrize("ends", [None, [0, 100, 100, 777, 1000]], ids=["dense", "packed"])
def test_gpu_matches_cpu_in_float64(operator, levels, ends):
    inputs = operator.inputs(B=1, T=1000, K=16, V=24, L=levels)
    cu_seqlens = None if ends is None else torch.tensor(ends)
    expected, weights = run(operator, inputs, cu_seqlens=cu_seqlens, chunk_size=16)
    actual, _ = run(
        operator, on("cuda", inputs), tuple(w.cuda() for w in weights), cu_seqlens=cu_seqlens, chunk_size=16
    )
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a.cpu(), e) < 1e-10 or float((a.cpu() - e).norm()) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_output_error(operator, dtype):
    rounded = on("cuda", operator.inputs(T=3000, K=64, V=64, L=13), dtype)
    exact = operator(on("cuda", rounded, torch.float64)).output
    error = relative_error(operator(rounded, impl="torch").output, exact)
    assert error < 1.02 * relative_error(exact.to(dtype), exact) + 6e-7


def test_two_gpu_runs_give_the_same_bits(operator):
    inputs = on("cuda", operator.inputs(T=3000, K=32, V=32, L=8), torch.float32)
    first, weights = run(operator, inputs)
    second, _ = run(operator, inputs, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gpu_prefill_and_decode_equal_the_full_forward(operator):
    inputs = on("cuda", operator.inputs(T=100, L=9))
    state = operator({n: x[:, :61] for n, x in inputs.items()}, chunk_size=8, output_final_state=True).final_state
    outputs = []
    for t in range(61, 100):
        token = {name: x[:, t : t + 1] for name, x in inputs.items()}
        out = operator(token, chunk_size=8, initial_state=state, output_final_state=True)
        outputs.append(out.output)
        state = out.final_state
    assert relative_error(torch.cat(outputs, 1), operator(inputs, chunk_size=8).output[:, 61:]) < 1e-10

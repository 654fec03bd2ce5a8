"""With every lambda equal to 1 the operators are the linear models, as another library computes them."""

import pytest
import torch
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from loglinear.ops import log_linear_attention, log_linear_delta_rule
from tests.ops.operators import OPERATORS, excess, relative_error

# transformers computes in float32 whatever the inputs, and rounds at other places: its results are at most this many
# times as far from ours in float64 as ours in float32 are (measured: 2.3)
FACTOR = 6


def check_equal(theirs, function, inputs, whole):
    """theirs: output and final state. whole: nothing waits in the buffer, and the blocks' sum is the linear model's."""
    ours, exact = (function(*(x.to(dtype) for x in inputs)) for dtype in (torch.float32, torch.float64))
    assert excess(theirs[0], ours.output, exact.output) <= FACTOR
    if whole:
        assert excess(theirs[1], *(x.final_state.blocks.sum(1) for x in (ours, exact))) <= FACTOR


@pytest.mark.parametrize("levels", [1, 4, 9, 12])
@pytest.mark.parametrize("T", [1, 63, 200])
def test_scalar_gate_equals_transformers_mamba2(T, levels):
    B, H, G, K, V = 2, 4, 2, 16, 8
    x, dt = torch.randn(B, T, H, V), torch.rand(B, T, H) * 0.5
    A, keys, queries = -torch.rand(H) * 2, torch.randn(B, T, G, K), torch.randn(B, T, G, K)
    linear, final = mamba2_chunk_scan(x, dt, A, keys, queries, chunk_size=32, return_final_states=True)

    def ours(x, dt, A, keys, queries, scales):
        v = x * dt[..., None]
        return log_linear_attention(queries, keys, v, A * dt, scales, chunk_size=16, output_final_state=True)

    inputs = [x, dt, A, keys, queries, torch.ones(B, T, H, levels)]
    check_equal((linear, final.mT), ours, inputs, whole=T % 16 == 0)


@pytest.mark.parametrize("levels", [1, 4, 9, 12])
@pytest.mark.parametrize("linear", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
@pytest.mark.parametrize("T", [1, 63, 192])
def test_delta_rule_equals_transformers_qwen3_next(T, linear, levels):
    inputs = {name: x.detach() for name, x in OPERATORS[1].inputs(T=T, K=16, V=8, dtype=torch.float32).items()}
    q, k, v, log_decay, beta = (inputs[name] for name in ("q", "k", "v", "log_decay", "beta"))
    theirs = linear(q, k, v, g=log_decay, beta=beta, output_final_state=True)

    def ours(*inputs):
        return log_linear_delta_rule(*inputs, scale=16**-0.5, chunk_size=32, output_final_state=True)

    check_equal(theirs, ours, [q, k, v, log_decay, beta, torch.ones(2, T, 4, levels)], whole=T % 32 == 0)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_one_level_is_the_linear_model_times_lambda(operator):
    inputs = operator.inputs(L=1)
    plain = operator({**inputs, "level_scales": torch.ones_like(inputs["level_scales"])}, chunk_size=4).output
    assert relative_error(operator(inputs, chunk_size=4).output, plain * inputs["level_scales"]) < 1e-10


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_unused_levels_change_nothing(operator):
    inputs = operator.inputs(T=33, L=7)
    more = torch.cat([inputs["level_scales"], torch.full((2, 33, 4, 5), 7.0, dtype=torch.float64)], -1)
    wide = operator({**inputs, "level_scales": more}, chunk_size=4).output
    assert relative_error(wide, operator(inputs, chunk_size=4).output) < 1e-12


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_the_delta_rule_brings_keys_to_length_one(impl):
    operator = OPERATORS[1]
    inputs = operator.inputs(B=1, T=21, G=1, H=2, K=5, V=3, L=6)
    longer = {n: (3 * x if n in "qk" else x).detach().requires_grad_() for n, x in inputs.items()}
    unit = {n: x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() if n in "qk" else x for n, x in longer.items()}
    actual = operator(longer, impl=impl, l2_normalize=True).output
    expected = operator(unit, impl=impl).output
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(actual)
    grads = [torch.autograd.grad(output, list(longer.values()), weight) for output in (actual, expected)]
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a, e)

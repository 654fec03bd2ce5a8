"""Gates of upgraded Kimi Delta Attention: strong ones, safe ones, and those of 16-bit models."""

import pytest
import torch

from loglinear.upgrades.kimi_delta_attention import UpgradedForgetGate
from tests.upgrades.tiny import close, original, tokens, upgraded, wide


@pytest.mark.parametrize(
    ("family", "options", "bound"),
    [
        ("kimi_linear", {}, None),
        ("bailing_hybrid", {"kda_safe_gate": True, "kda_lower_bound": -2.0}, -2.0),
        ("bailing_hybrid", {"kda_safe_gate": False}, None),
        ("glm5_next", {"linear_lower_bound": -3.0}, -3.0),
        ("glm5_next", {"linear_lower_bound": None}, None),
    ],
)
@torch.no_grad()
def test_strong_gates_keep_the_logits(family, options, bound):
    theirs, ids = original(family, **options), tokens(2, 75)
    gates = [module for name, module in theirs.named_modules() if name.endswith("forget_gate")]
    for gate in gates:
        gate.A_log.fill_(2.0)
        gate.dt_bias.uniform_(-4, 4)  # without a bound up to -30 a token
    model = upgraded(theirs)
    seen = []
    for module in model.modules():
        if isinstance(module, UpgradedForgetGate):
            module.register_forward_hook(lambda gate, args, log_decay: seen.append(log_decay.min().item()))
    with wide():
        assert close(model(ids).logits, theirs(ids).logits)
    assert len(seen) == len(gates) == 2
    assert min(seen) < -20 if bound is None else bound <= min(seen) < bound + 0.01


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("kimi_linear", torch.float32), ("bailing_hybrid", torch.bfloat16), ("glm5_next", torch.float32)],
)
@torch.no_grad()
def test_gates_of_16_bit_models_have_the_dtype_that_transformers_gives_them(family, dtype):
    theirs = original(family, torch.bfloat16)
    model, x = upgraded(theirs), torch.randn(2, 9, 32, dtype=torch.bfloat16)
    gates = [[m for name, m in each.named_modules() if name.endswith("forget_gate")] for each in (theirs, model)]
    for gate in sum(gates, []):  # from_pretrained keeps these in float32
        gate.A_log.data, gate.dt_bias.data = gate.A_log.float(), gate.dt_bias.float()
    for right, ours in zip(*gates, strict=True):
        assert right(x).dtype == ours(x).dtype == dtype
        rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(ours(x).float(), right(x).float(), rtol=rounding, atol=1e-6)  # theirs: log(1 + exp(x))

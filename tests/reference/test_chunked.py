"""The short listing of the algorithm equals the O(T^2) definition, with every gradient."""

import pytest
import torch

from loglinear.reference import chunked_scalar_gate, dense_scalar_gate


@pytest.mark.parametrize("decays", [1, 3], ids=["scalar", "diagonal"])
@pytest.mark.parametrize(
    ("T", "C", "L"), [(1, 1, 1), (8, 4, 5), (12, 4, 20), (20, 4, 3), (64, 16, 8), (112, 16, 6), (128, 8, 1)]
)
def test_chunked_matches_dense_with_every_gradient(T, C, L, decays):
    shapes = {"q": (T, 3), "k": (T, 3), "v": (T, 2), "log_decay": (T, decays), "level_scales": (T, L)}
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    inputs["log_decay"] = -inputs["log_decay"].abs()
    leaves = [x.requires_grad_() for x in inputs.values()]
    actual = chunked_scalar_gate(*leaves, C)
    q, k, v, log_decay, scales = (x[None] for x in leaves)
    expected = dense_scalar_gate(q, k, v, log_decay[..., 0] if decays == 1 else log_decay, scales)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    for name, a, e in zip(
        inputs, *(torch.autograd.grad((x * weights).sum(), leaves) for x in (actual, expected)), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")

import inspect

import pytest
import torch

from loglinear.variants import VARIANTS, HeadSizes, get_variant

HEADS = HeadSizes(num_heads=4, num_groups=2, key_dim=8, head_dim=6)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    shapes = ((2, 5, 16), (2, 5, 2, 8), (2, 5, 2, 8), (2, 5, 4, 6))
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def test_unknown_variant_names_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"unknown variant 'gated_deltanet': did you mean 'gated_delta_net'\? There are"
    ):
        get_variant("gated_deltanet")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_cites_its_source_and_has_valid_paper_heads(name: str) -> None:
    assert "arXiv" in (inspect.getdoc(VARIANTS[name]) or "")
    VARIANTS[name].paper_heads.check()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gates_have_their_range_and_at_least_float32(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    variant = VARIANTS[name](16, HEADS).to(dtype)
    operands = variant(*inputs(dtype))
    wide = torch.promote_types(dtype, torch.float32)
    if operands.log_decay is not None:
        assert operands.log_decay.shape == ((2, 5, 4, 8) if variant.diagonal_gate else (2, 5, 4))
        assert operands.log_decay.dtype == wide
        assert operands.log_decay.max() <= 0
    assert (operands.beta is None) == (variant.transition == "scalar_gate")
    if operands.beta is not None:
        assert operands.beta.shape == (2, 5, 4) and operands.beta.dtype == wide
        assert operands.beta.min() > 0 and operands.beta.max() < 1
    assert operands.q.dtype == operands.k.dtype == operands.v.dtype == dtype


def test_the_delta_rules_alone_ask_for_keys_of_length_one() -> None:
    delta_rules = {"delta_net", "gated_delta_net", "kimi_delta_attention"}
    assert {name for name, variant in VARIANTS.items() if variant.l2_normalize} == delta_rules


def test_retnet_decays_are_the_papers() -> None:
    log_decay = VARIANTS["retnet"](16, HEADS)(*inputs()).log_decay
    expected = torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256]).log()
    torch.testing.assert_close(log_decay, expected.expand(2, 5, 4))


def test_mamba2_time_step_scales_value_and_decay_alike() -> None:
    variant = VARIANTS["mamba2"](16, HEADS).double()
    x, q, k, v = inputs(torch.float64)
    operands = variant(x, q, k, v)
    time_step = operands.v / v
    torch.testing.assert_close(operands.log_decay, -variant.gate_bias.A_log.exp() * time_step[..., 0])
    torch.testing.assert_close(variant.skip_bias(torch.zeros_like(v), v), variant.skip_bias.D[:, None] * v)


@pytest.mark.parametrize("heads", [HeadSizes(4, 3, 8, 8), HeadSizes(4, 2, 0, 8), HeadSizes(0, 1, 8, 8)])
def test_impossible_heads_raise(heads: HeadSizes) -> None:
    with pytest.raises(ValueError, match="must be"):
        VARIANTS["mamba2"](16, heads)

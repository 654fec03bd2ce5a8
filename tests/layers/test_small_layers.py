import pytest
import torch
from torch.nn import functional as F

from loglinear.layers import GatedRMSNorm, LevelScales, Packing, ShortConvolution, SwiGLU


def random_cuts(total: int) -> list[int]:
    return [0, 1, 1, 5, 6, total]  # one token, none, shorter than the kernel, ...


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_convolution_is_the_causal_sum(kernel: int, bias: bool) -> None:
    torch.manual_seed(0)
    conv = ShortConvolution(3, kernel, bias=bias).double()
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for t in range(7):
        for w in range(kernel):
            if t - kernel + 1 + w >= 0:
                expected[:, t] += conv.weight[:, w] * x[:, t - kernel + 1 + w]
    if conv.bias is not None:
        torch.nn.init.normal_(conv.bias)
        expected = expected + conv.bias
    torch.testing.assert_close(conv(x)[0], F.silu(expected))


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 5], [2, 1, 6], [3, 3, 3]])
@pytest.mark.parametrize("kernel", [1, 4])
def test_convolution_in_pieces_is_the_whole(pieces: list[int], kernel: int) -> None:
    conv = ShortConvolution(3, kernel, bias=True).double()
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    state, outputs = None, []
    for piece in x.split(pieces, dim=1):
        y, state = conv(piece, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), conv(x)[0])


@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_packed_convolution_is_the_separate_ones_with_state_and_gradients(kernel: int) -> None:
    torch.manual_seed(0)
    conv = ShortConvolution(3, kernel, bias=True).double()
    x = torch.randn(1, 11, 3, dtype=torch.float64, requires_grad=True)
    state = torch.randn(5, kernel - 1, 3, dtype=torch.float64, requires_grad=True)
    cuts = random_cuts(11)
    y, new_state = conv(x, state, Packing.from_cu_seqlens(torch.tensor(cuts), 11, kernel))
    parts = [
        conv(x[:, a:b], state[n : n + 1]) for n, (a, b) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)) if b > a
    ]
    torch.testing.assert_close(y, torch.cat([part for part, _ in parts], 1))
    expected_state = torch.cat([parts[0][1], state[1:2], *(s for _, s in parts[1:])])  # the empty one keeps its state
    torch.testing.assert_close(new_state, expected_state)
    weights = torch.randn_like(y)
    got = torch.autograd.grad((y * weights).sum(), (x, state, conv.weight), retain_graph=True, allow_unused=True)
    separate = torch.cat([part for part, _ in parts], 1)
    expected = torch.autograd.grad((separate * weights).sum(), (x, state, conv.weight), allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b) or a.numel() == 0


def test_unpad_and_pad_are_inverse() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    x = torch.randn(3, 4, 2)
    packing = Packing.from_mask(mask, 4)
    assert packing.cu_seqlens.tolist() == [0, 2, 2, 5]
    torch.testing.assert_close(packing.unpad(x)[0], x[mask])
    torch.testing.assert_close(packing.pad(packing.unpad(x)), x * mask[..., None])


@pytest.mark.parametrize("form", ["softplus", "bounded", "unit"])
def test_lambda_has_its_formula(form: str) -> None:
    torch.manual_seed(0)
    scales = LevelScales(6, 2, 3, form).double()
    for parameter in scales.parameters():
        torch.nn.init.normal_(parameter)
    x, L = torch.randn(2, 4, 6, dtype=torch.float64), scales.level_bias.L
    logits = (x @ scales.proj.weight.T).view(2, 4, 2, 3)
    expected = {
        "softplus": lambda: F.softplus(L * logits),
        "bounded": lambda: (-L.exp() * F.softplus(logits)).exp(),
        "unit": lambda: 1 + F.elu(logits + scales.proj.bias.view(2, 3)),
    }[form]()
    torch.testing.assert_close(scales(x), expected)
    assert scales(x).min() >= 0


def test_unit_lambda_starts_at_exactly_one_and_still_learns() -> None:
    scales = LevelScales(6, 2, 3, "unit")
    out = scales(torch.randn(2, 4, 6))
    assert torch.equal(out, torch.ones(2, 4, 2, 3))
    out.sum().backward()
    assert scales.proj.weight.grad is not None and scales.proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("form", ["softplus", "unit"])
def test_tokens_of_a_finest_block_share_one_lambda(form: str) -> None:
    torch.manual_seed(0)
    scales = LevelScales(6, 2, 5, form, finest_block=4)
    torch.nn.init.normal_(scales.proj.weight)
    assert scales.proj.weight.shape == (2 * 3, 6)
    out = scales(torch.randn(2, 4, 6))
    assert out.shape == (2, 4, 2, 5)
    near, middle, far = out[..., :3], out[..., 3], out[..., 4]  # levels 0 to 2 lie in a block of 4
    assert torch.equal(near, near[..., :1].expand_as(near))
    assert not torch.equal(near[..., 0], middle) and not torch.equal(middle, far)


@pytest.mark.parametrize("block", [0, 3, 16])
def test_a_finest_block_is_a_power_of_two_that_leaves_two_lambdas(block: int) -> None:
    with pytest.raises(ValueError, match=f"finest_block must be a power of two .* got {block} with 5 levels"):
        LevelScales(6, 2, 5, finest_block=block)


def test_lambda_is_float32_for_16_bit_inputs() -> None:
    assert LevelScales(6, 2, 3).bfloat16()(torch.randn(1, 2, 6, dtype=torch.bfloat16)).dtype == torch.float32


def test_lambda_refuses_an_unknown_form_and_a_single_level() -> None:
    with pytest.raises(ValueError, match="lambda_form must be one of softplus, bounded, unit, got 'relu'"):
        LevelScales(6, 2, 3, "relu")
    with pytest.raises(ValueError, match="num_levels must be at least 2"):
        LevelScales(6, 2, 1)


@pytest.mark.parametrize("groups", [1, 2])
def test_gated_norm_orders(groups: int) -> None:
    torch.manual_seed(0)
    y, z = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 20, dtype=torch.float64)
    first = GatedRMSNorm(4, 5, groups, gate_first=True, eps=1e-5).double()
    torch.nn.init.normal_(first.weight)
    gated = (y.flatten(2) * F.silu(z)).view(2, 3, groups, 20 // groups)
    rms = (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(first(y, z), (gated / rms).flatten(2) * first.weight)

    after = GatedRMSNorm(4, 5, groups, gate_first=False, eps=1e-5).double()
    torch.nn.init.normal_(after.weight)
    rms = (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(after(y, z), (y / rms * after.weight).flatten(2) * F.silu(z))


def test_swiglu_formula() -> None:
    mlp = SwiGLU(4, 6)
    x = torch.randn(3, 4)
    gate, up = mlp.gate_up.weight.split(6)
    torch.testing.assert_close(mlp(x), (F.silu(x @ gate.T) * (x @ up.T)) @ mlp.down.weight.T)

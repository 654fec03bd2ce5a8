# T time, D hidden size, H heads, K key, V value
"""GLA and Kimi Delta Attention against transformers' layers, and against the linear recurrences written out."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextLinearAttention
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

from loglinear.layers import Mixer
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.variants import HeadSizes
from tests.upgrades.tiny import close, wide

D, T = 24, 150  # two chunks of 64 tokens and a part of a third
ONE_LAYER = dict(hidden_size=D, num_hidden_layers=1, layer_types=["linear_attention"])
SIZES = dict(linear_head_dim=6, linear_num_heads=4, rms_norm_eps=1e-5, **ONE_LAYER)
BOTH_LEVELS = pytest.mark.parametrize("levels", [1, 6])
"""L = 1 is the linear model; with more levels every lambda starts at 1."""


def mixer(variant: str, heads: HeadSizes, levels: int, **options) -> Mixer:
    return Mixer(D, heads, variant=variant, num_levels=levels, chunk_size=8, **options).double()


def randomized(layer: nn.Module) -> nn.Module:
    """Give all parameters but those of lambda random values, so that no gate, norm or bias is neutral."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.startswith("level_scales."):
                parameter.copy_(0.5 * torch.randn(parameter.shape))
    return layer.double()


def kimi_linear(levels: int) -> tuple[nn.Module, Mixer]:
    theirs = KimiLinearDeltaAttention(KimiLinearConfig(**SIZES), layer_idx=0)
    return randomized(theirs), mixer("kimi_delta_attention", HeadSizes(4, 4, 6, 6), levels)


def glm5_next(levels: int) -> tuple[nn.Module, Mixer]:
    theirs = Glm5NextTextLinearAttention(Glm5NextTextConfig(**SIZES, linear_lower_bound=-5.0), layer_idx=0)
    heads = HeadSizes(4, 4, 6, 6)
    return randomized(theirs), mixer("kimi_delta_attention", heads, levels, gate_lower_bound=-5.0)


@pytest.mark.parametrize("models", [kimi_linear, glm5_next])
@BOTH_LEVELS
def test_kimi_delta_attention_with_lambda_1_is_transformers_layer(models, levels: int) -> None:
    theirs, ours = models(levels)
    weights = {
        "in_proj.weight": torch.cat([getattr(theirs, f"{name}_proj").weight for name in ("g_a", "q", "k", "v")]),
        "gate_up.weight": theirs.g_b_proj.weight,
        "conv.weight": theirs.conv1d.weight.squeeze(1),
        "variant.gates.weight": theirs.b_proj.weight,
        "variant.decay_proj.0.weight": theirs.forget_gate.f_a_proj.weight,
        "variant.decay_proj.1.weight": theirs.forget_gate.f_b_proj.weight,
        "variant.gate_bias.A_log": theirs.forget_gate.A_log.flatten(),
        "variant.gate_bias.dt_bias": theirs.forget_gate.dt_bias.view(4, 6),
        "norm.weight": theirs.o_norm.weight,
        "out_proj.weight": theirs.o_proj.weight,
    }
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("level_scales.") for name in missing)
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    with wide():
        right = theirs(x)
        (right_dx,) = torch.autograd.grad(right.square().sum(), x)
    y = ours(x)[0]
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert close(y, right) and close(dx, right_dx)


def linear_recurrence(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None = None) -> Tensor:
    """Return the outputs [B, T, H, V] of the linear model, token by token, with one state [B, H, K, V].

    It is fla-core 0.6.0's `naive_recurrent_gla`, with beta its `naive_recurrent_kda`, in their inputs' dtype.
    """
    state, outputs = 0.0, []
    for t in range(q.shape[1]):
        state = state * log_decay[:, t].exp().unsqueeze(-1)
        written = v[:, t] if beta is None else beta[:, t, :, None] * (v[:, t] - (k[:, t, :, None] @ state).squeeze(-2))
        state = state + k[:, t].unsqueeze(-1) * written.unsqueeze(-2)
        outputs.append((q[:, t, :, None] @ state).squeeze(-2) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, 1)


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))


def normed(y: Tensor, weight: Tensor) -> Tensor:
    return y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


@BOTH_LEVELS
def test_gla_with_lambda_1_is_the_linear_recurrence(levels: int) -> None:
    """By default there is no convolution and no SiLU, as in the published layer."""
    ours = mixer("gla", HeadSizes(4, 4, 6, 5), levels)
    randomized(ours)
    x = torch.randn(2, T, D, dtype=torch.float64)
    z, q, k, v = (heads_of(part, 4) for part in F.linear(x, ours.in_proj.weight).split([20, 24, 24, 20], -1))
    gate = F.linear(F.linear(x, ours.variant.decay_proj[0].weight), *ours.variant.decay_proj[1].parameters())
    y = linear_recurrence(q, k, v, heads_of(F.logsigmoid(gate) / 16, 4))
    right = F.linear((normed(y, ours.norm.weight) * F.silu(z)).flatten(2), ours.out_proj.weight)
    assert not [name for name, _ in ours.named_parameters() if name.startswith("conv.")]
    assert close(ours(x)[0], right)


@BOTH_LEVELS
def test_kimi_delta_attention_with_lambda_1_is_the_linear_recurrence(levels: int) -> None:
    """Keys and values have different sizes here, which transformers' layer does not offer."""
    ours = mixer("kimi_delta_attention", HeadSizes(4, 4, 6, 5), levels, conv_kernel=0)
    randomized(ours)
    x, own = torch.randn(2, T, D, dtype=torch.float64), ours.variant
    z, q, k, v = F.linear(x, ours.in_proj.weight).split([5, 24, 24, 20], -1)
    q, k = (each / (each.square().sum(-1, keepdim=True) + 1e-6).sqrt() for each in (heads_of(q, 4), heads_of(k, 4)))
    gate = heads_of(F.linear(F.linear(x, own.decay_proj[0].weight), own.decay_proj[1].weight), 4)
    log_decay = -own.gate_bias.A_log.exp()[:, None] * F.softplus(gate + own.gate_bias.dt_bias)
    y = linear_recurrence(q, k, heads_of(v, 4), log_decay, F.linear(x, own.gates.weight).sigmoid())
    gated = normed(y, ours.norm.weight) * heads_of(F.linear(z, ours.gate_up.weight), 4).sigmoid()
    assert close(ours(x)[0], F.linear(gated.flatten(2), ours.out_proj.weight))


def test_the_safe_gate_bounds_every_decay() -> None:
    torch.manual_seed(0)
    layer = mixer("kimi_delta_attention", HeadSizes(2, 1, 6, 5), 3, gate_lower_bound=-2.0)
    assert layer.variant.gate_bias.A_log.count_nonzero() == 0  # the first rates are 1
    layer.variant.gate_bias.dt_bias.data.normal_(std=30)
    x = torch.randn(1, 50, D, dtype=torch.float64)
    (q, k, v, log_decay, _), _ = layer._operands(x, layer._project(x)[1])
    assert q.shape == k.shape == (1, 50, 1, 6) and v.shape == (1, 50, 2, 5) and log_decay.shape == (1, 50, 2, 6)
    assert -2.0 <= log_decay.min() < -1.99 and -0.01 < log_decay.max() <= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(variant="gla", gate_lower_bound=-5.0), "gate_lower_bound needs the variant kimi_delta_attention, got 'g"),
        (dict(variant="kimi_delta_attention", gate_lower_bound=5.0), "gate_lower_bound must be below 0, got 5.0"),
        (dict(variant="gla", negative_eigenvalues=True), "needs a variant with the delta rule, got 'gla'"),
        (dict(variant="gla", conv_kernel=-1), "conv_kernel must be an integer of at least 0, got -1"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogLinearConfig(**options)


def test_the_convolution_is_the_variants_unless_it_is_chosen(tmp_path) -> None:
    assert LogLinearConfig(variant="gla").conv_kernel == 0
    assert LogLinearConfig(variant="kimi_delta_attention").conv_kernel == LogLinearConfig().conv_kernel == 4
    config = LogLinearConfig(variant="gla", conv_kernel=3, num_hidden_layers=1, hidden_size=D)
    model = LogLinearForCausalLM(config)
    assert model.model.layers[0].mixer.conv.weight.shape == (3 * 8 * 64, 3)
    model.save_pretrained(tmp_path)
    assert LogLinearConfig.from_pretrained(tmp_path).conv_kernel == 3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", ["gla", "kimi_delta_attention"])
def test_padding_is_no_part_of_a_sequence(variant: str, side: str) -> None:
    """A mixer without a convolution takes padding out as the others do."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=D, num_hidden_layers=2, num_levels=6, num_heads=2, key_dim=6, head_dim=5, chunk_size=8)
    layers = ["linear_attention", "full_attention"]
    config = LogLinearConfig(variant=variant, lambda_form="softplus", layer_types=layers, **sizes)
    model = LogLinearForCausalLM(config).double().eval()
    ids, length = torch.randint(0, 200, (2, 40)), torch.tensor([[40], [27]])
    mask = torch.arange(40) < length if side == "right" else torch.arange(40) >= 40 - length
    logits = model(ids, attention_mask=mask.long()).logits
    for row in range(2):
        assert close(logits[row, mask[row]], model(ids[row, mask[row]][None]).logits[0])

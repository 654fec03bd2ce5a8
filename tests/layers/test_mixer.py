"""The mixer against transformers' own pure-torch mixers, and its own properties."""

import pytest
import torch
from torch import Tensor
from transformers import Mamba2Config, Qwen3NextConfig
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from loglinear.layers import Mixer, MixerDecodeState, Packing, Routing
from loglinear.ops import impl_reference, log_linear_delta_rule
from loglinear.ops import step as step_module
from loglinear.partition import Partition
from loglinear.variants import VARIANTS, HeadSizes
from tests.ops.operators import excess

T = 37  # crosses chunks of 8 and is no multiple of them


def tiny(variant: str, **options) -> Mixer:
    torch.manual_seed(0)
    defaults = dict(num_levels=5, lambda_form="softplus", chunk_size=4)
    return Mixer(12, HeadSizes(4, 2, 6, 5), variant=variant, **{**defaults, **options}).double()


def check_equal(theirs: torch.nn.Module, ours: Mixer) -> None:
    """theirs computes in float32: it is as near to ours in float64 as ours in float32 is, within a factor of 10
    (measured: 4.1)."""
    hidden = torch.randn(2, T, 24)
    mine, exact = ours(hidden)[0], ours.double()(hidden.double())[0]
    assert excess(theirs(hidden), mine, exact) <= 10


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_with_one_level_is_transformers_mamba2(groups: int) -> None:
    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=24,
        num_heads=6,
        head_dim=8,
        expand=2,
        state_size=10,
        n_groups=groups,
        conv_kernel=4,
        chunk_size=8,
        num_hidden_layers=1,
        layer_norm_epsilon=1e-5,
    )
    theirs = Mamba2Mixer(config, layer_idx=0)
    for parameter in (theirs.D, theirs.norm.weight, theirs.conv1d.bias):
        torch.nn.init.normal_(parameter)
    ours = Mixer(24, HeadSizes(6, groups, 10, 8), variant="mamba2", num_levels=1, chunk_size=8)
    width, keys = 48, groups * 10
    z, x, b, c, dt = theirs.in_proj.weight.split([width, width, keys, keys, 6])
    conv_x, conv_b, conv_c = theirs.conv1d.weight.squeeze(1).split([width, keys, keys])
    bias_x, bias_b, bias_c = theirs.conv1d.bias.split([width, keys, keys])
    weights = {
        "in_proj.weight": torch.cat([z, c, b, x]),
        "conv.weight": torch.cat([conv_c, conv_b, conv_x]),
        "conv.bias": torch.cat([bias_c, bias_b, bias_x]),
        "variant.gates.weight": dt,
        "variant.gate_bias.A_log": theirs.A_log,
        "variant.gate_bias.dt_bias": theirs.dt_bias,
        "variant.skip_bias.D": theirs.D,
        "norm.weight": theirs.norm.weight,
        "out_proj.weight": theirs.out_proj.weight,
    }
    ours.load_state_dict(weights)
    check_equal(theirs, ours)


@pytest.mark.parametrize("groups", [2, 4])
def test_gated_delta_net_with_one_level_is_transformers_qwen3_next(groups: int) -> None:
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        hidden_size=24,
        linear_num_value_heads=4,
        linear_num_key_heads=groups,
        linear_key_head_dim=6,
        linear_value_head_dim=5,
        linear_conv_kernel_dim=4,
        num_hidden_layers=1,
        rms_norm_eps=1e-5,
        layer_types=["linear_attention"],
    )
    theirs = Qwen3NextGatedDeltaNet(config, layer_idx=0)
    torch.nn.init.normal_(theirs.norm.weight)
    torch.nn.init.normal_(theirs.dt_bias)
    ours = Mixer(24, HeadSizes(4, groups, 6, 5), variant="gated_delta_net", num_levels=1, chunk_size=8)
    ratio = 4 // groups
    per_group = theirs.in_proj_qkvz.weight.unflatten(0, (groups, -1)).split([6, 6, 5 * ratio, 5 * ratio], dim=1)
    q, k, v, z = (t.flatten(0, 1) for t in per_group)
    beta, gate = (t.flatten(0, 1) for t in theirs.in_proj_ba.weight.unflatten(0, (groups, -1)).split(ratio, dim=1))
    weights = {
        "in_proj.weight": torch.cat([z, q, k, v]),
        "conv.weight": theirs.conv1d.weight.squeeze(1),
        "variant.gates.weight": torch.cat([gate, beta]),
        "variant.gate_bias.A_log": theirs.A_log,
        "variant.gate_bias.dt_bias": theirs.dt_bias,
        "norm.weight": theirs.norm.weight,
        "out_proj.weight": theirs.out_proj.weight,
    }
    ours.load_state_dict(weights)
    check_equal(theirs, ours)


@pytest.mark.parametrize("variant", VARIANTS)
def test_unit_lambda_starts_as_the_linear_model(variant: str) -> None:
    mixer, twin = tiny(variant, lambda_form="unit"), tiny(variant, num_levels=1)
    shared = {name: value for name, value in mixer.state_dict().items() if not name.startswith("level_scales")}
    twin.load_state_dict(shared)
    x = torch.randn(2, T, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], twin(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_causality(variant: str) -> None:
    mixer = tiny(variant)
    x = torch.randn(1, T, 12, dtype=torch.float64)
    changed = x.clone()
    changed[:, 20:] = 5.0
    torch.testing.assert_close(mixer(changed)[0][:, :20], mixer(x)[0][:, :20], rtol=0, atol=1e-13)


def gradients(mixer: Mixer, x: Tensor, output: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return list(torch.autograd.grad((output * weights).sum(), [x, *mixer.parameters()]))


@pytest.mark.parametrize("variant", ["mamba2", "gated_delta_net", "gla", "kimi_delta_attention"])
def test_packed_is_separate_with_every_gradient(variant: str) -> None:
    mixer = tiny(variant)
    x = torch.randn(1, T, 12, dtype=torch.float64, requires_grad=True)
    cuts = [0, 1, 10, 10, 13, T]
    packed, state = mixer(x, Packing.from_cu_seqlens(torch.tensor(cuts), T, mixer.conv.kernel), return_state=True)
    separate = torch.cat([mixer(x[:, a:b])[0] for a, b in zip(cuts[:-1], cuts[1:], strict=True) if b > a], 1)
    torch.testing.assert_close(packed, separate, rtol=1e-11, atol=1e-12)
    assert state is not None and state.fenwick.position.tolist() == [1, 9, 0, 3, 24]
    for a, b in zip(gradients(mixer, x, packed), gradients(mixer, x, separate), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_of_any_length_are_the_whole(variant: str) -> None:
    mixer = tiny(variant)
    x = torch.randn(2, T, 12, dtype=torch.float64)
    state, outputs = None, []
    for piece in x.split([1, 1, 9, 4, 1, 21], dim=1):
        y, state = mixer(piece, state=state, return_state=True)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), mixer(x)[0], rtol=1e-11, atol=1e-12)


def test_state_has_one_size_and_holds_no_view_of_the_prompt() -> None:
    mixer = tiny("mamba2")
    sizes = set()
    for length in (1, 7, 200):
        state = mixer(torch.randn(2, length, 12, dtype=torch.float64), return_state=True)[1]
        assert state is not None
        sizes.add(MixerDecodeState.of(state).nbytes)
        assert state.conv.untyped_storage().nbytes() == state.conv.nbytes
    assert len(sizes) == 1


def test_a_piece_that_is_all_padding_moves_no_sequence() -> None:
    mixer, x = tiny("mamba2"), torch.randn(2, 3, 12, dtype=torch.float64)
    state = mixer(x, return_state=True)[1]
    padding = Packing.from_mask(torch.zeros(2, 3, dtype=torch.bool), 4)
    y, after = mixer(x, padding, state, return_state=True)
    assert after is state and torch.equal(y, torch.zeros_like(x))
    assert mixer(x, padding, return_state=True)[1] is None  # nothing has begun


def test_one_level_has_no_lambda_parameters() -> None:
    assert not [name for name, _ in tiny("mamba2", num_levels=1).named_parameters() if "level_scales" in name]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_steps_run_what_was_asked_for_and_give_the_whole(variant: str, impl: str, monkeypatch) -> None:
    other = (impl_reference, "step") if impl == "torch" else (step_module, "_torch_step")
    monkeypatch.setattr(*other, None)  # cannot be called
    mixer = tiny(variant, impl=impl)
    x = torch.randn(2, T, 12, dtype=torch.float64)
    whole, before = mixer(x)[0], mixer(x[:, :6], return_state=True)[1]
    state = MixerDecodeState.of(before)
    with torch.no_grad():
        outputs = [mixer.step(x[:, t : t + 1], state) for t in range(6, T)]
    torch.testing.assert_close(torch.cat(outputs, 1), whole[:, 6:], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("routed", [False, True])
def test_a_state_that_starts_at_a_position_shares_no_memory(routed: bool) -> None:
    """Its parts are stepped in place, each with a position of its own."""
    options = dict(partition=Partition(4, 4), routing=Routing()) if routed else {}
    mixer, x = tiny("gated_delta_net", **options), torch.randn(2, 1, 12, dtype=torch.float64)
    given = torch.tensor([3, 6])
    state = mixer.starting_at(given, x)
    assert state is not None
    decode = MixerDecodeState.of(state)
    for _ in range(2):
        mixer.step(x, decode)
    assert given.tolist() == state.fenwick.position.tolist() == [3, 6]
    sums = [] if state.sums is None else state.sums.tensors
    assert len(sums) == (6 if routed else 0)
    pointers = [part.untyped_storage().data_ptr() for part in (given, state.conv, *state.fenwick.tensors, *sums)]
    assert len(set(pointers)) == len(pointers)


def test_a_decode_state_takes_one_token_a_row() -> None:
    mixer, x = tiny("mamba2"), torch.randn(2, 3, 12, dtype=torch.float64)
    state = mixer(x, return_state=True)[1]
    with pytest.raises(ValueError, match=r"x must have shape \[B, 1, D\] .* for a MixerDecodeState, got \[2, 3, 12\]"):
        mixer(x, state=MixerDecodeState.of(state))
    with pytest.raises(ValueError, match="active needs a MixerDecodeState as state, got MixerState"):
        mixer(x, state=state, active=torch.ones(2, dtype=torch.bool))


@pytest.mark.parametrize("variant", ["mamba2", "gated_delta_net"])
def test_a_state_of_something_else_is_named_and_moves_nothing(variant: str) -> None:
    mixer, x = tiny(variant), torch.randn(2, 5, 12, dtype=torch.float64)
    _, state = mixer(x, return_state=True)
    decode = MixerDecodeState.of(state)
    kept = [part.clone() for part in decode.tensors]
    token = x[:, :1]
    wrong = [
        (lambda: mixer(token, state=state.fenwick), "state must be a MixerState or a MixerDecodeState, got Fenwick"),
        (lambda: mixer(token, state=state._replace(conv=None)), "state.conv must be a tensor, got NoneType"),
        (lambda: mixer(token, state=state._replace(conv=state.conv[1:])), r"state.conv must have shape \[S, W, C\]"),
        (lambda: mixer(token[:1], state=decode), r"state.conv must have shape \[S, W, C\] = \[1, 3, "),
        (lambda: mixer(token, state=decode, active=torch.ones(2)), "active must hold bool, got torch.float32"),
        (lambda: decode.copy_(state._replace(conv=state.conv[:, 1:])), r"state.conv must have shape \[2, 3, "),
        (lambda: decode.copy_(mixer(x[:1], return_state=True)[1]), r"state.conv must have shape \[2, 3, "),
        (lambda: MixerDecodeState.of(state.fenwick), "state must be a MixerState, got FenwickState"),
        (lambda: decode.index_select(torch.tensor([2])), "rows must be from 0 to 1, the state's rows, got 2"),
    ]
    for call, text in wrong:
        with pytest.raises(ValueError, match=text):
            call()
    assert all(torch.equal(a, b) for a, b in zip(decode.tensors, kept, strict=True))


@pytest.mark.parametrize("variant", ["delta_net", "gated_delta_net"])
def test_negative_eigenvalues_double_the_write_strengths(variant: str) -> None:
    mixer = tiny(variant, negative_eigenvalues=True)
    plain = tiny(variant)
    plain.load_state_dict(mixer.state_dict())
    x, seen = torch.randn(1, 9, 12, dtype=torch.float64), []

    def operator(q, k, v, log_decay, beta, *args, **kwargs):
        seen.append(beta)
        return log_linear_delta_rule(q, k, v, log_decay, beta, *args, **kwargs)

    for each in (mixer, plain):
        each.operator = operator
        each(x)
    assert torch.equal(seen[0], 2 * seen[1]) and seen[0].max() > 1


def test_negative_eigenvalues_need_the_delta_rule() -> None:
    with pytest.raises(ValueError, match="negative_eigenvalues needs a variant with the delta rule, got 'mamba2'"):
        tiny("mamba2", negative_eigenvalues=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mixer_without_a_gate_has_none_of_its_parameters(variant: str) -> None:
    """Its output is that of a mixer with a gate whose silu(z) or sigmoid(z) is 1 everywhere."""
    gated, bare = tiny(variant), tiny(variant, output_gate=False)
    one = 40.0 if gated.variant.sigmoid_gate else 1.2784645427610738  # the gate of this number is 1
    weights = gated.state_dict()
    weights["in_proj.weight"] = weights["in_proj.weight"][gated.gate_width :]
    weights.pop("gate_up.weight", None)
    bare.load_state_dict(weights)
    project = gated._project
    gated._project = lambda x: (torch.full_like(project(x)[0], one), *project(x)[1:])
    x = torch.randn(2, T, 12, dtype=torch.float64)
    torch.testing.assert_close(bare(x)[0], gated(x)[0])
    assert bare.in_proj.out_features == gated.in_proj.out_features - gated.gate_width and bare.gate_up is None

"""Checkpoints of the authors' log-linear-attention, compared with its layers written out token by token."""

import pytest

from loglinear.convert import convert
from tests.convert import references
from tests.convert.checkpoints import assert_same, converted_logits, tokens
from tests.convert.fla_checkpoints import (
    LAYERS,
    attention_shapes,
    decoder_config,
    decoder_tensors,
    delta_shapes,
    mamba2_config,
    mamba2_tensors,
    write,
)

HEADS = (3, 3, 6, 9)


def test_log_linear_mamba2(tmp_path):
    w = mamba2_tensors(1, "mixer_norm", levels=15)
    own = {"layer_norm_epsilon": 1e-3, "num_heads": 4, "rms_norm": True, "time_step_limit": [0.0, float("inf")]}
    ours = converted_logits("authors", write(tmp_path, mamba2_config("hattention", 1, **own), w), tmp_path / "out")
    sizes = dict(heads=4, groups=1, head_dim=12, state=5)
    assert_same(ours, references.backbone(w, tokens(), LAYERS, 1e-3, "mixer_norm", levels=15, **sizes))


@pytest.mark.parametrize("gate", [True, False])
def test_log_linear_gated_delta_net(tmp_path, gate):
    """Its queries are not scaled; a large epsilon shows whether the output norm makes up for it."""
    config = decoder_config("h_gated_deltanet", head_dim=6, num_heads=3, expand_v=1.5, norm_eps=1e-2, use_gate=gate)
    w = decoder_tensors(lambda layer, at: delta_shapes(at, HEADS, gate=gate, levels=7))

    def mixer(x, layer, at):
        return references.delta_rule(x, w, at, HEADS, eps=1e-2, scaled=False, levels=7)

    ours = converted_logits("authors", write(tmp_path, config, w), tmp_path / "out")
    assert_same(ours, references.decoder(w, tokens(), LAYERS, mixer, 1e-2))


def test_a_first_layer_of_softmax_attention_has_no_levels(tmp_path):
    spec = {"layers": [0], "num_heads": 2, "num_kv_heads": 1, "qkv_bias": False, "window_size": None}
    config = decoder_config("h_gated_deltanet", head_dim=6, num_heads=3, expand_v=1.5, attn=spec)

    def shapes(layer, at):
        return attention_shapes(at, 12) if layer == 0 else delta_shapes(at, HEADS, levels=7)

    w = decoder_tensors(shapes)

    def mixer(x, layer, at):
        if layer == 0:
            return references.attention(x, w, at, heads=2, key_value_heads=1, theta=1e4)
        return references.delta_rule(x, w, at, HEADS, eps=1e-6, scaled=False, levels=7)

    ours = converted_logits("authors", write(tmp_path, config, w), tmp_path / "out")
    assert_same(ours, references.decoder(w, tokens(), LAYERS, mixer, 1e-6))


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (mamba2_config("hattention"), mamba2_tensors(2, "mixer_norm", 15), "n_groups = 2 cannot be represented"),
        (mamba2_config("mamba2"), {}, "model_type must be one of hattention, h_gated_deltanet, got 'mamba2'; this is"),
        (decoder_config("h_gated_deltanet", allow_neg_eigval=True), {}, "allow_neg_eigval = True cannot"),
        (decoder_config("h_gated_deltanet"), {}, "model.layers.0.attn.L is missing or no matrix, expected the level"),
        (
            decoder_config("h_gated_deltanet", matrix_router=True, head_dim=6, num_heads=3, expand_v=1.5),
            decoder_tensors(lambda layer, at: delta_shapes(at, HEADS, levels=7)),
            "matrix_router = True is not an option of this format that is known",
        ),
    ],
    ids=["n_groups", "model_type", "allow_neg_eigval", "L", "matrix_router"],
)
def test_options_that_cannot_be_represented_are_named(tmp_path, config, tensors, message):
    with pytest.raises(ValueError) as caught:
        convert(write(tmp_path, config, tensors), tmp_path / "out", source="authors")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]

"""Checkpoints of flash-linear-attention, compared with its layers written out token by token."""

import pytest

from loglinear.convert import convert
from tests.convert import references
from tests.convert.checkpoints import D, assert_same, converted_logits, tokens
from tests.convert.fla_checkpoints import (
    LAYERS,
    attention_shapes,
    decoder_config,
    decoder_tensors,
    delta_shapes,
    gla_shapes,
    mamba2_config,
    mamba2_tensors,
    write,
)
from tests.convert.test_transformers import mamba2 as transformers_mamba2

GROUPED, PLAIN = (4, 2, 6, 9), (3, 3, 8, 16)
GATED = [
    ({}, {}),
    ({"use_gate": False}, dict(gate=False)),
    ({"use_short_conv": False}, dict(conv=False)),
    ({"allow_neg_eigval": True, "norm_eps": 1e-3, "tie_word_embeddings": True}, {}),
]


@pytest.mark.parametrize(("own", "parts"), GATED, ids=str)
def test_gated_delta_net(tmp_path, own, parts):
    config = decoder_config("gated_deltanet", head_dim=6, num_heads=2, num_v_heads=4, expand_v=1.5, **own)
    w = decoder_tensors(lambda layer, at: delta_shapes(at, GROUPED, **parts), tied="tie_word_embeddings" in own)
    eps, scale = own.get("norm_eps", 1e-6), 2 if "allow_neg_eigval" in own else 1

    def mixer(x, layer, at):
        return references.delta_rule(x, w, at, GROUPED, eps=eps, beta_scale=scale)

    ours = converted_logits("fla", write(tmp_path, config, w), tmp_path / "out")
    assert_same(ours, references.decoder(w, tokens(), LAYERS, mixer, eps))


@pytest.mark.parametrize(
    ("own", "parts"),
    [
        ({}, dict(gate=False)),
        ({"use_gate": True, "allow_neg_eigval": True}, {}),
        ({"use_short_conv": False}, dict(conv=False, gate=False)),
    ],
    ids=str,
)
def test_delta_net(tmp_path, own, parts):
    config = decoder_config("delta_net", num_heads=3, expand_k=1, expand_v=2.0, **own)
    w = decoder_tensors(lambda layer, at: delta_shapes(at, PLAIN, gates="b", **parts))

    def mixer(x, layer, at):
        scale = 2 if "allow_neg_eigval" in own else 1
        return references.delta_rule(x, w, at, PLAIN, eps=1e-6, decay=False, beta_scale=scale)

    ours = converted_logits("fla", write(tmp_path, config, w), tmp_path / "out")
    assert_same(ours, references.decoder(w, tokens(), LAYERS, mixer, 1e-6))


GLA = (4, 4, 3, 6)


@pytest.mark.parametrize(
    ("own", "parts"),
    [
        ({}, {}),
        ({"use_short_conv": True, "norm_eps": 1e-3}, dict(conv=True)),
        ({"fuse_norm": False}, dict(norm="g_norm")),
        ({"use_output_gate": False, "tie_word_embeddings": True}, dict(gate=False, norm="g_norm")),
        ({"num_kv_heads": 2}, {}),
        ({"num_kv_heads": 1, "use_short_conv": True}, dict(conv=True)),
    ],
    ids=str,
)
def test_gla(tmp_path, own, parts):
    """Without options the keys have half the width of the hidden states and the values the whole."""
    config, shared = decoder_config("gla", num_heads=4, **own), own.get("num_kv_heads", 4)
    w = decoder_tensors(
        lambda layer, at: gla_shapes(at, GLA, key_value_heads=shared, **parts), tied="tie_word_embeddings" in own
    )
    eps = own.get("norm_eps", 1e-6)

    def mixer(x, layer, at):
        return references.gla(x, w, at, GLA, key_value_heads=shared, eps=eps)

    ours = converted_logits("fla", write(tmp_path, config, w), tmp_path / "out")
    assert_same(ours, references.decoder(w, tokens(), LAYERS, mixer, eps))


def test_copies_of_shared_keys_are_noted(tmp_path):
    notes = {}
    for shared in (2, 4):
        w = decoder_tensors(lambda layer, at, shared=shared: gla_shapes(at, GLA, key_value_heads=shared))
        config = decoder_config("gla", num_heads=4, num_kv_heads=shared)
        notes[shared] = convert(write(tmp_path, config, w), tmp_path / str(shared), source="fla", num_levels=4).notes
    note = "several heads share keys and values in the checkpoint: each gets a copy, which training would change"
    assert note in notes[2] and note not in notes[4]


@pytest.mark.parametrize("listed", [False, True])
def test_layers_of_softmax_attention(tmp_path, listed):
    spec = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": False, "window_size": None, "rope_theta": 1e3}
    attn = [spec] if listed else spec
    config = decoder_config("gated_deltanet", head_dim=6, num_heads=2, num_v_heads=4, expand_v=1.5, attn=attn)

    def shapes(layer, at):
        return attention_shapes(at, 12) if layer == 1 else delta_shapes(at, GROUPED)

    w = decoder_tensors(shapes)

    def mixer(x, layer, at):
        if layer == 1:
            return references.attention(x, w, at, heads=4, key_value_heads=2, theta=1e3)
        return references.delta_rule(x, w, at, GROUPED, eps=1e-6)

    ours = converted_logits("fla", write(tmp_path, config, w), tmp_path / "out")
    assert_same(ours, references.decoder(w, tokens(), LAYERS, mixer, 1e-6))


def test_the_width_of_feed_forward_layers_follows_from_the_ratio(tmp_path):
    config = decoder_config("delta_net", num_heads=3, expand_v=2.0, intermediate_size=None, hidden_ratio=12)
    w = decoder_tensors(lambda layer, at: delta_shapes(at, PLAIN, gates="b", gate=False), width=256)
    result = convert(write(tmp_path, config, w), tmp_path / "out", source="fla")
    assert result.config.intermediate_size == 256


@pytest.mark.parametrize("own", [{}, {"norm_eps": 1e-3, "dt_limit": [0.0, {"__float__": "Infinity"}]}], ids=str)
def test_mamba2(tmp_path, own):
    w = mamba2_tensors()
    eps = own.get("norm_eps", 1e-5)
    ours = converted_logits("fla", write(tmp_path, mamba2_config("mamba2", **own), w), tmp_path / "out")
    sizes = dict(heads=4, groups=2, head_dim=12, state=5)
    assert_same(ours, references.backbone(w, tokens(), LAYERS, eps, **sizes))


def test_log_linear_mamba2(tmp_path):
    w = mamba2_tensors(norm="mixer_norm", levels=15)
    folder = write(tmp_path, mamba2_config("log_linear_mamba2", chunk_size=64, residual_in_fp32=False), w)
    ours = converted_logits("fla", folder, tmp_path / "out")
    sizes = dict(heads=4, groups=2, head_dim=12, state=5)
    assert_same(ours, references.backbone(w, tokens(), LAYERS, 1e-5, "mixer_norm", levels=15, **sizes))


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(folder, message, **levels):
    with pytest.raises(ValueError) as caught:
        convert(folder, folder.parent / "out", source="fla", **levels)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in folder.parent.iterdir()] == ["in"]


def test_a_folder_of_transformers_is_named(tmp_path):
    """It has the same model_type and tensors, and other defaults: special tokens that config.json leaves out."""
    transformers_mamba2(tmp_path / "in", n_groups=1, bos_token_id=None, pad_token_id=None)
    refused(
        tmp_path / "in", "no option of flash-linear-attention is there, so this is a folder of transformers: --from tr"
    )
    config = convert(tmp_path / "in", tmp_path / "out", source="transformers").config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 2, None)


def test_levels_of_a_log_linear_checkpoint_are_its_own(tmp_path):
    folder = write(tmp_path, mamba2_config("log_linear_mamba2"), mamba2_tensors(norm="mixer_norm", levels=15))
    refused(folder, "num_levels must be left out or be 15, which the checkpoint has, got 3", num_levels=3)
    refused(folder, "routing must be left out or be None, which the checkpoint has, got 'gram'", routing="gram")
    assert convert(folder, tmp_path / "out", source="fla", num_levels=15).config.lambda_form == "softplus"


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("kda", "model_type 'kda' cannot be represented: its output gate has a bias"),
        ("retnet", "model_type 'retnet' cannot be represented: it rotates queries and keys"),
        ("rwkv7", "model_type must be one of mamba2, gated_deltanet, delta_net, gla, log_linear_mamba2, got 'rwkv7'"),
    ],
)
def test_models_that_cannot_be_represented_are_named(tmp_path, model_type, message):
    refused(write(tmp_path, {"model_type": model_type}, {}), message)


MAMBA2 = [
    ({"use_bias": True}, "use_bias = True cannot be represented, expected False"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu' cannot be represented, expected 'silu' or 'swish'"),
    ({"rmsnorm": False}, "rmsnorm = False cannot be represented, expected True"),
    ({"norm_before_gate": True}, "norm_before_gate = True cannot be represented, expected False"),
    ({"D_has_hdim": True}, "D_has_hdim = True cannot be represented, expected False"),
    ({"dt_limit": [0.0, 1.0]}, "dt_limit = [0.0, 1.0] cannot be represented, expected [0.0, inf]"),
    ({"num_heads": 8}, "num_heads = 8 cannot be represented, expected 4"),
    ({"attnres_block_size": 2}, "attnres_block_size = 2 cannot be represented, expected None"),
    ({"anything": 1}, "anything = 1 is not an option of this format that is known"),
]


@pytest.mark.parametrize(("own", "message"), MAMBA2, ids=str)
@pytest.mark.parametrize("model_type", ["mamba2", "log_linear_mamba2"])
def test_options_of_mamba2_that_cannot_be_represented_are_named(tmp_path, model_type, own, message):
    levels = dict(norm="mixer_norm", levels=15) if model_type == "log_linear_mamba2" else {}
    refused(write(tmp_path, mamba2_config(model_type, **own), mamba2_tensors(**levels)), message)


def test_a_log_linear_checkpoint_without_level_weights_is_named(tmp_path):
    folder = write(tmp_path, mamba2_config("log_linear_mamba2"), mamba2_tensors(norm="mixer_norm"))
    refused(folder, "backbone.layers.0.mixer.L is missing or no matrix, expected the level weights [H, L]")


def test_a_log_linear_checkpoint_of_one_level_is_named(tmp_path):
    folder = write(tmp_path, mamba2_config("log_linear_mamba2"), mamba2_tensors(norm="mixer_norm", levels=1))
    refused(folder, "backbone.layers.0.mixer.L is [4, 1], expected at least 2 levels")


ATTENTION = {"layers": [1], "num_heads": 4}
SHARED = [
    ({"hidden_act": "powlu"}, "hidden_act = 'powlu' cannot be represented, expected 'swish'"),
    ({"attnres_block_size": 2}, "attnres_block_size = 2 cannot be represented, expected None"),
    ({"anything": 1}, "anything = 1 is not an option of this format that is known"),
    ({"attn": 3}, "attn must be dict | list | None, got 3"),
    ({"attn": [3]}, "attn must be an object or a list of objects, got [3]"),
    ({"attn": {**ATTENTION, "qkv_bias": True}}, "attn: qkv_bias = True cannot be represented, expected False"),
    ({"attn": {**ATTENTION, "qk_norm": True}}, "attn: qk_norm = True cannot be represented, expected False"),
    ({"attn": {**ATTENTION, "window_size": 8}}, "attn: window_size = 8 cannot be represented, expected None"),
    ({"attn": {**ATTENTION, "anything": 8}}, "attn: anything = 8 is not an option of this format that is known"),
    ({"attn": {**ATTENTION, "num_heads": 5}}, "attn: num_heads must divide hidden_size = 24, got 5"),
    ({"attn": {"layers": [1]}}, "attn: num_heads must lie between 1 and 2147483647, got 0"),
    ({"attn": {**ATTENTION, "layers": ["1"]}}, "attn: layers must be a list of integers, got ['1']"),
    ({"attn": {**ATTENTION, "layers": [2]}}, "attn: layers must be some of 0 to 1, got [2]"),
    ({"attn": {**ATTENTION, "layers": [0, 1]}}, "attn: layers must be some of 0 to 1, got [0, 1]"),
    ({"attn": [ATTENTION, {"layers": [0], "num_heads": 2}]}, "expected layers of one kind"),
]
GATED_ONLY = [
    ({"output_gate_activation": "sigmoid"}, "output_gate_activation = 'sigmoid' cannot be represented, expected"),
    ({"use_gate": "yes"}, "use_gate must be bool, got 'yes'"),
]
DELTA_ONLY = [
    ({"use_beta": False}, "use_beta = False cannot be represented, expected True"),
    ({"use_output_norm": False}, "use_output_norm = False cannot be represented, expected True"),
    ({"qk_norm": "sum"}, "qk_norm = 'sum' cannot be represented, expected 'l2'"),
    ({"qk_activation": "relu"}, "qk_activation = 'relu' cannot be represented, expected 'silu'"),
    ({"num_heads": 5}, "attn.q_proj.weight is [24, 24], expected [20, 24]"),
]


GLA_ONLY = [
    ({"clamp_min": -3.0}, "clamp_min = -3.0 cannot be represented, expected None"),
    ({"feature_map": "relu"}, "feature_map = 'relu' cannot be represented, expected None"),
    ({"elementwise_affine": False}, "elementwise_affine = False cannot be represented, expected True"),
    ({"use_gk": False}, "use_gk = False cannot be represented, expected True"),
    ({"use_gv": True}, "use_gv = True cannot be represented, expected False"),
    ({"gate_low_rank_dim": 8}, "gate_low_rank_dim = 8 is not an option of this format that is known"),
    ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads = 4, got 3"),
    ({"num_heads": 5}, "attn.g_proj.weight is [24, 24], expected [20, 24]"),
]


@pytest.mark.parametrize(("own", "message"), SHARED + GLA_ONLY, ids=str)
def test_options_of_gla_that_cannot_be_represented_are_named(tmp_path, own, message):
    w = decoder_tensors(lambda layer, at: gla_shapes(at, GLA, key_value_heads=4))
    refused(write(tmp_path, decoder_config("gla", **{"num_heads": 4, **own}), w), message)


@pytest.mark.parametrize(("own", "message"), SHARED + GATED_ONLY, ids=str)
def test_options_of_gated_delta_net_that_cannot_be_represented_are_named(tmp_path, own, message):
    config = decoder_config("gated_deltanet", **{"head_dim": 6, "num_heads": 2, "expand_v": 1.5, **own})
    w = decoder_tensors(lambda layer, at: delta_shapes(at, (2, 2, 6, 9)))
    refused(write(tmp_path, config, w), message)


@pytest.mark.parametrize(("own", "message"), SHARED + DELTA_ONLY, ids=str)
def test_options_of_delta_net_that_cannot_be_represented_are_named(tmp_path, own, message):
    config = decoder_config("delta_net", **{"num_heads": 3, "expand_v": 2, **own})
    w = decoder_tensors(lambda layer, at: delta_shapes(at, PLAIN, gates="b", gate=False))
    refused(write(tmp_path, config, w), message)


def test_biases_of_convolutions_are_unexpected(tmp_path):
    bias = "model.layers.0.attn.q_conv1d.bias"
    w = decoder_tensors(
        lambda layer, at: {**delta_shapes(at, PLAIN, gates="b", gate=False), f"{at}q_conv1d.bias": (D,)}
    )
    refused(
        write(tmp_path, decoder_config("delta_net", num_heads=3, expand_v=2), w), f"{bias} is [24], expected nothing"
    )

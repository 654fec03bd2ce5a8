"""Checkpoints of state-spaces' mamba_ssm: Mamba-2 layers, with and without feed-forward layers, also as pickles."""

import math

import pytest
import torch
from torch.nn import functional as F

from loglinear.convert import convert
from tests.convert import references
from tests.convert.checkpoints import VOCABULARY, D, assert_same, converted_logits, random_tensors, tokens
from tests.convert.checkpoints import write_checkpoint as write

CONFIG = {
    "d_model": D,
    "d_intermediate": 0,
    "n_layer": 2,
    "vocab_size": VOCABULARY - 3,
    "rms_norm": True,
    "ssm_cfg": {"layer": "Mamba2", "headdim": 12, "d_state": 5, "ngroups": 2},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 10,
    "tie_embeddings": True,
}


def config_with(**options):
    """The configuration above with other options, those of the layers under their own names."""
    layer = {name: options.pop(name) for name in [*options] if name not in (*CONFIG, "anything", "norm_epsilon")}
    return {**CONFIG, **options, "ssm_cfg": {**CONFIG["ssm_cfg"], **layer}}


def tensors_of(config, conv_bias=True):
    inner, keys, heads = 2 * D, 2 * 5, 4
    shapes = {"backbone.embedding.weight": (VOCABULARY, D), "backbone.norm_f.weight": (D,)}
    for layer in range(2):
        at = f"backbone.layers.{layer}."
        shapes |= {
            f"{at}norm.weight": (D,),
            f"{at}mixer.in_proj.weight": (2 * inner + 2 * keys + heads, D),
            f"{at}mixer.conv1d.weight": (inner + 2 * keys, 1, 4),
            f"{at}mixer.A_log": (heads,),
            f"{at}mixer.dt_bias": (heads,),
            f"{at}mixer.D": (heads,),
            f"{at}mixer.norm.weight": (inner,),
            f"{at}mixer.out_proj.weight": (D, inner),
        }
        if conv_bias:
            shapes[f"{at}mixer.conv1d.bias"] = (inner + 2 * keys,)
        if config["d_intermediate"]:
            width = math.ceil(config["d_intermediate"] / 128) * 128
            shapes |= {f"{at}norm2.weight": (D,), f"{at}mlp.fc1.weight": (2 * width, D)}
            shapes[f"{at}mlp.fc2.weight"] = (D, width)
    tensors = random_tensors(shapes)
    return {**tensors, "lm_head.weight": tensors["backbone.embedding.weight"].clone()}


def logits_of(config, w):
    x = w["backbone.embedding.weight"][tokens()]
    for layer in range(2):
        at = f"backbone.layers.{layer}."
        normed = references.rms_norm(x, w[f"{at}norm.weight"], 1e-5)
        x = x + references.mamba2(normed, w, f"{at}mixer.", heads=4, groups=2, head_dim=12, state=5)
        if config["d_intermediate"]:
            normed = references.rms_norm(x, w[f"{at}norm2.weight"], 1e-5)
            up, gate = references.linear(normed, w, f"{at}mlp.fc1").chunk(2, -1)
            x = x + references.linear(up * F.silu(gate), w, f"{at}mlp.fc2")
    return references.linear(references.rms_norm(x, w["backbone.norm_f.weight"], 1e-5), w, "lm_head")


@pytest.mark.parametrize("own", [{}, {"d_intermediate": 100}, {"conv_bias": False}, {"tie_embeddings": False}], ids=str)
@pytest.mark.parametrize("pickle", [False, True], ids=["safetensors", "pickle"])
def test_logits_are_those_of_the_model(tmp_path, own, pickle):
    config = config_with(**own)
    tensors = tensors_of(config, own.get("conv_bias", True))
    if not config["tie_embeddings"]:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0)
    write(tmp_path / "in", config, tensors, pickle=pickle)
    assert_same(converted_logits("state-spaces", tmp_path / "in", tmp_path / "out"), logits_of(config, tensors))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"layer": "Mamba1"}, "ssm_cfg: layer must be 'Mamba2', got 'Mamba1'"),
        ({"layer": None}, "ssm_cfg: layer must be 'Mamba2', got None"),
        ({"d_ssm": 24}, "ssm_cfg: d_ssm = 24 cannot be represented, expected None or 48"),
        ({"rmsnorm": False}, "ssm_cfg: rmsnorm = False cannot be represented, expected True"),
        ({"norm_before_gate": True}, "ssm_cfg: norm_before_gate = True cannot be represented, expected False"),
        ({"D_has_hdim": True}, "ssm_cfg: D_has_hdim = True cannot be represented, expected False"),
        ({"bias": True}, "ssm_cfg: bias = True cannot be represented, expected False"),
        ({"dt_limit": [0.0, 0.1]}, "ssm_cfg: dt_limit = [0.0, 0.1] cannot be represented, expected [0.0, inf]"),
        ({"new": 3}, "ssm_cfg: new = 3 is not an option of this format that is known"),
        ({"ssm_cfg": "Mamba2"}, "ssm_cfg must be dict, got 'Mamba2'"),
        ({"rms_norm": False}, "rms_norm = False cannot be represented, expected True"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx = [1] cannot be represented, expected []"),
        ({"norm_epsilon": 1e-3}, "norm_epsilon = 0.001 cannot be represented, expected 1e-05"),
        ({"anything": 3}, "anything = 3 is not an option of this format that is known"),
        ({"n_layer": 0}, "n_layer must lie between 1 and 2147483647, got 0"),
        ({"n_layer": 10**9}, "config.json has 1,000,000,000 layers, and there are 21 tensors"),
        ({"d_model": 10**9}, "backbone.embedding.weight is [50, 24], expected [50, 1000000000]"),
        ({"headdim": 100}, "num_heads must be an integer of at least 1, got 0"),
    ],
    ids=str,
)
def test_options_that_cannot_be_represented_are_named(tmp_path, own, message):
    whole = isinstance(own.get("ssm_cfg"), str)
    config = {**CONFIG, **own} if whole else config_with(**own)
    folder = write(tmp_path / "in", config, tensors_of(CONFIG))
    with pytest.raises(ValueError) as caught:
        convert(folder, tmp_path / "out", source="state-spaces")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


class Evil:
    def __reduce__(self):
        return print, ("it ran",)


@pytest.mark.parametrize(
    "content",
    [Evil(), {"weight": Evil()}, [torch.ones(1)], {"weight": 1}, None],
    ids=["object", "object of a name", "list", "number", "nothing"],
)
def test_a_pickle_of_anything_but_tensors_is_refused(tmp_path, capsys, content):
    folder = write(tmp_path / "in", CONFIG, {}, pickle=True)
    file = folder / "pytorch_model.bin"
    if content is None:
        file.write_bytes(file.read_bytes()[:-100])
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match="pytorch_model.bin (is damaged or holds more|holds a)") as caught:
        convert(folder, tmp_path / "out", source="state-spaces")
    assert "\n" not in str(caught.value) and "it ran" not in capsys.readouterr().out

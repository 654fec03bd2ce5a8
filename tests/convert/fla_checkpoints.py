# D hidden size, G groups, H heads, K key, V value, L levels
"""Tiny checkpoints of flash-linear-attention and of the authors' log-linear-attention, which derives from it."""

from tests.convert.checkpoints import VOCABULARY, D, random_tensors, write_checkpoint

LAYERS, WIDTH = 2, 40


def delta_shapes(at, heads, *, gates="ab", gate=True, conv=True, levels=0):
    """Shapes of a delta-rule layer with heads (H, G, K, V) and kernel 3."""
    H, G, K, V = heads
    widths = {"q": G * K, "k": G * K, "v": H * V}
    shapes = {f"{at}{part}_proj.weight": (width, D) for part, width in widths.items()}
    shapes |= {f"{at}{gate}_proj.weight": (H, D) for gate in gates}
    if conv:
        shapes |= {f"{at}{part}_conv1d.weight": (width, 1, 3) for part, width in widths.items()}
    if gate:
        shapes[f"{at}g_proj.weight"] = (H * V, D)
    if "a" in gates:
        shapes |= {f"{at}A_log": (H,), f"{at}dt_bias": (H,)}
    if levels:
        shapes |= {f"{at}l_proj.weight": (H * levels, D), f"{at}L": (H, levels)}
    return {**shapes, f"{at}o_norm.weight": (V,), f"{at}o_proj.weight": (D, H * V)}


def gla_shapes(at, heads, *, key_value_heads, gate=True, conv=False, norm="g_norm_swish_gate"):
    """Shapes of a GLA layer with heads (H, H, K, V) and, with `conv`, kernel 3."""
    H, _, K, V = heads
    widths = {"q": H * K, "k": key_value_heads * K, "v": key_value_heads * V}
    shapes = {f"{at}{part}_proj.weight": (width, D) for part, width in widths.items()}
    shapes |= {f"{at}gk_proj.0.weight": (16, D), f"{at}gk_proj.1.weight": (widths["k"], 16)}
    shapes[f"{at}gk_proj.1.bias"] = (widths["k"],)
    if conv:
        shapes |= {f"{at}{part}_conv1d.weight": (width, 1, 3) for part, width in widths.items()}
    if gate:
        shapes[f"{at}g_proj.weight"] = (H * V, D)
    return {**shapes, f"{at}{norm}.weight": (V,), f"{at}o_proj.weight": (D, H * V)}


def attention_shapes(at, key_value_width):
    widths = {"q": D, "k": key_value_width, "v": key_value_width, "o": D}
    return {f"{at}{part}_proj.weight": (width, D) for part, width in widths.items()}


def mlp_shapes(at, width):
    return {
        f"{at}mlp_norm.weight": (D,), f"{at}mlp.gate_proj.weight": (width, D), f"{at}mlp.up_proj.weight": (width, D),
        f"{at}mlp.down_proj.weight": (D, width),
    }  # fmt: skip


def decoder_tensors(mixer, width=WIDTH, tied=False):
    """Tensors of a model with blocks attn_norm, attn, mlp_norm, mlp; `mixer(layer, at)` gives the shapes of attn."""
    shapes = {"model.embeddings.weight": (VOCABULARY, D), "model.norm.weight": (D,), "lm_head.weight": (VOCABULARY, D)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}attn_norm.weight": (D,), **mixer(layer, f"{at}attn."), **mlp_shapes(at, width)}
    tensors = random_tensors(shapes)
    return {**tensors, "lm_head.weight": tensors["model.embeddings.weight"].clone()} if tied else tensors


def decoder_config(model_type, **own):
    return {
        "model_type": model_type, "hidden_size": D, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY,
        "conv_size": 3, "intermediate_size": WIDTH, "hidden_ratio": 4, "attn": None, "attn_mode": "chunk",
        "attnres_block_size": None, "fuse_norm": True, "fuse_swiglu": True, "fuse_cross_entropy": True,
        "fuse_linear_cross_entropy": False, "use_l2warp": False, "hidden_act": "swish", "initializer_range": 0.02,
        "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "use_cache": True,
        "tie_word_embeddings": False, "dtype": "float64", "transformers_version": "5.23.0", **own,
    }  # fmt: skip


def mamba2_tensors(groups=2, norm="norm", levels=0):
    """Tensors of a Mamba-2 model with 4 heads of 12 and states of 5; a log-linear one has feed-forward layers."""
    heads, inner, keys = 4, 48, groups * 5
    shapes = {"backbone.embeddings.weight": (VOCABULARY, D), "backbone.norm_f.weight": (D,)}
    shapes["lm_head.weight"] = (VOCABULARY, D)
    for layer in range(LAYERS):
        at = f"backbone.layers.{layer}."
        shapes |= {
            f"{at}{norm}.weight": (D,), f"{at}mixer.in_proj.weight": (2 * inner + 2 * keys + heads * (1 + levels), D),
            f"{at}mixer.conv1d.weight": (inner + 2 * keys, 1, 3), f"{at}mixer.conv1d.bias": (inner + 2 * keys,),
            f"{at}mixer.A_log": (heads,), f"{at}mixer.dt_bias": (heads,), f"{at}mixer.D": (heads,),
            f"{at}mixer.norm.weight": (inner,), f"{at}mixer.out_proj.weight": (D, inner),
        }  # fmt: skip
        if levels:
            shapes |= {f"{at}mixer.L": (heads, levels), **mlp_shapes(at, 256)}
    return random_tensors(shapes)


def mamba2_config(model_type, groups=2, **own):
    return {
        "model_type": model_type, "hidden_size": D, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY,
        "head_dim": 12, "state_size": 5, "n_groups": groups, "conv_kernel": 3, "expand": 2, "use_bias": False,
        "use_conv_bias": True, "hidden_act": "silu", "initializer_range": 0.02, "rescale_prenorm_residual": True,
        "chunk_size": 64, "residual_in_fp32": False, "fuse_norm": True, "fuse_cross_entropy": True, "use_cache": True,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **own,
    }  # fmt: skip


def write(tmp_path, config, tensors):
    return write_checkpoint(tmp_path / "in", config, tensors)

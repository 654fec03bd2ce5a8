"""The options that the models of flash-linear-attention share, and their blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from loglinear.convert.layouts import Sizes, Weights, swiglu, under
from loglinear.convert.source import Options, Tensors
from loglinear.runs.json_files import fits
from loglinear.variants import HeadSizes


def feed_forward_width(hidden_size: int, ratio: int) -> int:
    """Return two thirds of `ratio` times the hidden size, rounded up to a multiple of 256."""
    return -(-int(hidden_size * ratio * 2 / 3) // 256) * 256


class Attention(NamedTuple):
    """The softmax attention of some layers."""

    layers: frozenset[int]
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float

    @classmethod
    def of(cls, options: Options, hidden_size: int, num_layers: int) -> Attention | None:
        """Return the choices of the option `attn`, an object or several; None without one.

        Raises ValueError for objects that differ in more than their layers, and for an option we do not have.
        """
        found = options.get("attn", dict | list | None, None)
        listed = [] if found is None else [found] if isinstance(found, dict) else found
        if not all(isinstance(spec, dict) for spec in listed):
            raise ValueError(f"{options.place}: attn must be an object or a list of objects, got {found!r}")
        specs = [cls._of_one(Options(f"{options.place}: attn", spec), hidden_size) for spec in listed]
        if len({spec[1:] for spec in specs}) > 1:
            raise ValueError(f"{options.place}: attn = {found!r} cannot be represented, expected layers of one kind")
        if not specs:
            return None
        layers = specs[0].layers.union(*(spec.layers for spec in specs))
        if not all(0 <= layer < num_layers for layer in layers) or len(layers) == num_layers:
            raise ValueError(
                f"{options.place}: attn: layers must be some of 0 to {num_layers - 1}, got {sorted(layers)}"
            )
        return specs[0]._replace(layers=layers)

    @classmethod
    def _of_one(cls, options: Options, hidden_size: int) -> Attention:
        heads = options.size("num_heads", 0)
        if hidden_size % heads:
            raise ValueError(f"{options.place}: num_heads must divide hidden_size = {hidden_size}, got {heads}")
        key_value_heads = options.size_or("num_kv_heads", heads)
        for name, expected in (("qkv_bias", False), ("qk_norm", False), ("window_size", None)):
            options.expect(name, expected)
        theta = float(options.get("rope_theta", float, 10_000.0))
        layers = options.get("layers", list, [])
        if not all(fits(layer, int) for layer in layers):
            raise ValueError(f"{options.place}: layers must be a list of integers, got {layers!r}")
        options.check_all_known()
        return cls(frozenset(layers), heads, key_value_heads, hidden_size // heads, theta)

    def mixer(self, tensors: Tensors, at: str, hidden_size: int) -> Weights:
        """Return the weights of one layer under our names."""
        widths = {"q": hidden_size, "k": self.num_key_value_heads * self.head_dim}
        parts = [tensors.take(f"{at}{name}_proj.weight", widths.get(name, widths["k"]), hidden_size) for name in "qkv"]
        return {
            "qkv_proj.weight": torch.cat(parts),
            "out_proj.weight": tensors.take(f"{at}o_proj.weight", hidden_size, hidden_size),
        }


class Decoder(NamedTuple):
    """A model of blocks attn_norm, attn, mlp_norm, mlp."""

    sizes: Sizes
    width: int
    """The width of the feed-forward layers."""
    attention: Attention | None

    @classmethod
    def of(cls, options: Options, heads: HeadSizes, num_layers: int) -> Decoder:
        """Return the options that these models share. `num_layers` is the library's default."""
        hidden_size = options.size("hidden_size", 2048)
        kernel = options.size("conv_size", 4)
        sizes = Sizes(
            vocab_size=options.size("vocab_size", 32_000),
            hidden_size=hidden_size,
            num_layers=options.size("num_hidden_layers", num_layers),
            heads=heads,
            conv_kernel=kernel if options.get("use_short_conv", bool, True) else 1,
            eps=options.get("norm_eps", float, 1e-6),
            tied=options.get("tie_word_embeddings", bool, False),
        )
        width = feed_forward_width(hidden_size, options.size_or("hidden_ratio", 4))
        width = options.size_or("intermediate_size", width)
        options.expect("hidden_act", "swish")
        options.expect("attnres_block_size", None)
        options.ignore("attn_mode", "max_position_embeddings", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy")
        options.ignore("fuse_linear_cross_entropy", "use_l2warp")
        return cls(sizes, width, Attention.of(options, hidden_size, sizes.num_layers))

    @property
    def attention_layers(self) -> frozenset[int]:
        return frozenset() if self.attention is None else self.attention.layers

    def weights(self, tensors: Tensors, mixer: Callable[[Tensors, str, Sizes], Weights]) -> Weights:
        """Return all weights under our names. `mixer` reads a layer that is no softmax attention."""
        sizes, mlp = self.sizes, swiglu(tensors, self.sizes.hidden_size, self.width)
        weights = sizes.ends(tensors, "model.embeddings.weight", "model.norm.weight")
        for layer in range(sizes.num_layers):
            at = f"model.layers.{layer}."
            weights[f"{at}mixer_norm.weight"] = tensors.take(f"{at}attn_norm.weight", sizes.hidden_size)
            if self.attention is not None and layer in self.attention_layers:
                own = self.attention.mixer(tensors, f"{at}attn.", sizes.hidden_size)
            else:
                own = mixer(tensors, f"{at}attn.", sizes)
            weights |= under(f"{at}mixer.", own) | under(at, mlp(at))
        return weights

    def fields(self, variant: str, options: Options, **own: Any) -> dict[str, Any]:
        """Return the fields of `LogLinearConfig`, together with `own`."""
        fields = self.sizes.fields(variant, intermediate_size=self.width, **own)
        if self.attention is not None:
            kinds = ("linear_attention", "full_attention")
            fields |= dict(
                layer_types=[kinds[layer in self.attention_layers] for layer in range(self.sizes.num_layers)],
                num_attention_heads=self.attention.num_heads,
                num_key_value_heads=self.attention.num_key_value_heads,
                attention_head_dim=self.attention.head_dim,
                rope_theta=self.attention.rope_theta,
            )
        return fields | options.tokens(bos_token_id=1, eos_token_id=2)

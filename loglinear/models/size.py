"""How large a model is and what it remembers: parameters and state bytes from a configuration alone."""

from typing import NamedTuple

import torch

from loglinear.layers import LevelScales
from loglinear.models.configuration import LogLinearConfig
from loglinear.models.modeling import LogLinearForCausalLM
from loglinear.ops import FenwickState
from loglinear.variants import get_variant


class ParameterCounts(NamedTuple):
    """Numbers of parameters; tied embeddings count once."""

    total: int
    embeddings: int  # input table and, if it is not tied, the output head
    level_scales: int  # lambda: projections, L and biases of all layers

    @property
    def lambda_share(self) -> float:
        """lambda's part of all parameters, 0 to 1."""
        return self.level_scales / self.total


def parameter_counts(config: LogLinearConfig) -> ParameterCounts:
    """Counts on the meta device: nothing is allocated."""
    with torch.device("meta"):
        model = LogLinearForCausalLM(config)
    embeddings = {id(p): p.numel() for p in (model.model.embed_tokens.weight, model.lm_head.weight)}
    level_scales = (module for module in model.modules() if isinstance(module, LevelScales))
    return ParameterCounts(
        total=model.num_parameters(),
        embeddings=sum(embeddings.values()),
        level_scales=sum(p.numel() for module in level_scales for p in module.parameters()),
    )


def state_bytes(config: LogLinearConfig, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes that one sequence of `tokens` tokens leaves in the cache of a model in `dtype`.

    Linear layers: float32 `DecodeState` and the convolution's inputs in dtype, whatever `tokens` is. Full-attention
    layers: keys and values.
    """
    assert config.layer_types is not None
    heads = config.heads
    state = FenwickState.zeros(
        1,
        num_levels=config.num_levels,
        chunk_size=config.chunk_size,
        groups=heads.num_groups,
        heads=heads.num_heads,
        key_dim=heads.key_dim,
        value_dim=heads.head_dim,
        delta_rule=get_variant(config.variant).transition == "delta_rule",
        dtype=torch.promote_types(dtype, torch.float32),
        device="meta",
    )
    inverse = 0 if state.beta is None else state.beta.nbytes * config.chunk_size  # of `DecodeState`
    channels = 2 * heads.num_groups * heads.key_dim + heads.num_heads * heads.head_dim
    linear = state.nbytes + inverse + channels * (config.conv_kernel - 1) * dtype.itemsize
    full_layers = config.layer_types.count("full_attention")
    return (config.num_hidden_layers - full_layers) * linear + full_layers * _key_value_bytes(config, tokens, dtype)


def key_value_cache_bytes(config: LogLinearConfig, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of the KV cache of a Transformer of the same depth, with this configuration's attention heads."""
    return config.num_hidden_layers * _key_value_bytes(config, tokens, dtype)


def _key_value_bytes(config: LogLinearConfig, tokens: int, dtype: torch.dtype) -> int:
    assert config.num_key_value_heads is not None and config.attention_head_dim is not None
    return 2 * tokens * config.num_key_value_heads * config.attention_head_dim * dtype.itemsize

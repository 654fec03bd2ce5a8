"""The sizes of a model from its configuration alone: numbers of parameters, and bytes of its states."""

from typing import NamedTuple

import torch

from loglinear.layers import BucketWeights, LevelScales, Mixer
from loglinear.models.configuration import LogLinearConfig
from loglinear.models.modeling import LogLinearBlock, LogLinearForCausalLM


class ParameterCounts(NamedTuple):
    """The numbers of parameters of a model; tied embeddings count once."""

    total: int
    """All parameters."""
    embeddings: int
    """The input table and, if it is not tied, the output head."""
    level_scales: int
    """Lambda, or the weights of the routed read: projections and biases of all layers."""

    @property
    def lambda_share(self) -> float:
        """The share of lambda in all parameters, 0 to 1."""
        return self.level_scales / self.total


def parameter_counts(config: LogLinearConfig) -> ParameterCounts:
    """Return the parameter counts of a configuration, without allocating the model."""
    with torch.device("meta"):
        model = LogLinearForCausalLM(config)
    embeddings = {id(p): p.numel() for p in (model.model.embed_tokens.weight, model.lm_head.weight)}
    level_scales = (module for module in model.modules() if isinstance(module, LevelScales | BucketWeights))
    return ParameterCounts(
        total=model.num_parameters(),
        embeddings=sum(embeddings.values()),
        level_scales=sum(p.numel() for module in level_scales for p in module.parameters()),
    )


def state_bytes(config: LogLinearConfig, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the bytes of one sequence of `tokens` tokens in the cache of a model in `dtype`.

    A linear layer holds a float32 `DecodeState` and the last inputs of its convolution in `dtype`, for any number of
    tokens. A routed one also holds the sums of keys that it scores, in float32. A full-attention layer holds keys and
    values in `dtype`.
    """
    assert config.layer_types is not None
    full_layers = config.layer_types.count("full_attention")
    linear_layers = len(config.layer_types) - full_layers
    return linear_layers * _state_bytes(config, dtype) + full_layers * _key_value_bytes(config, tokens, dtype)


def _state_bytes(config: LogLinearConfig, dtype: torch.dtype) -> int:
    """Return the bytes of the state of one linear layer."""
    with torch.device("meta"):
        mixer = LogLinearBlock(config, "linear_attention").mixer
        assert isinstance(mixer, Mixer)
        conv, fenwick, sums = mixer.empty_state(1, torch.empty(1, 1, config.hidden_size, dtype=dtype))
    inverse = 0 if fenwick.beta is None else fenwick.beta.nbytes * fenwick.chunk_size  # DecodeState.inverse
    return conv.nbytes + fenwick.nbytes + inverse + (0 if sums is None else sums.nbytes)


def key_value_cache_bytes(config: LogLinearConfig, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the bytes of the KV cache of a Transformer with this configuration's depth and attention heads."""
    return config.num_hidden_layers * _key_value_bytes(config, tokens, dtype)


def _key_value_bytes(config: LogLinearConfig, tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes of the keys and values of one layer."""
    assert config.num_key_value_heads is not None and config.attention_head_dim is not None
    return 2 * tokens * config.num_key_value_heads * config.attention_head_dim * dtype.itemsize

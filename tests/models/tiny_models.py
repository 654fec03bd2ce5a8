"""Tiny models: chunks of 4 tokens, so that a few dozen tokens cross chunks and levels."""

import pytest
import torch

from loglinear.models import LogLinearConfig

LINEAR, FULL = "linear_attention", "full_attention"


def tiny_config(**options) -> LogLinearConfig:
    defaults = dict(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=24,
        num_heads=4,
        key_dim=6,
        head_dim=5,
        num_levels=5,
        chunk_size=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_head_dim=8,
        loss_chunk_size=7,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        lambda_form="softplus",  # "unit" starts at 1: no result would depend on which level is read
    )
    return LogLinearConfig(**{**defaults, **options})


HYBRID = {"variant": "gated_delta_net", "layer_types": [LINEAR, FULL]}
TRANSFORMER = {"layer_types": [FULL, FULL]}
ROUTED = {"radix": 4, "finest_block": 4, "routing": "gram"}  # tau starts at 1, so results depend on the buckets
ROUTED_DELTA = {
    **ROUTED,
    "routing": "selective_gram",
    "variant": "gated_delta_net",
    "largest_block": 4,
    "num_levels": 8,
}
ROUTED_GLA = {**ROUTED, "variant": "gla"}
ROUTED_KIMI = {**ROUTED, "routing": "selective_gram", "variant": "kimi_delta_attention"}
NO_GATE = {"variant": "delta_net", "output_gate": False, "negative_eigenvalues": True, "mixer_norm_eps": 1e-2}
KINDS = pytest.mark.parametrize(
    "options",
    [
        {"variant": "mamba2"},
        {"variant": "delta_net"},
        {"num_levels": 1},
        HYBRID,
        TRANSFORMER,
        ROUTED,
        ROUTED_DELTA,
        NO_GATE,
    ],
    ids=["mamba2", "delta_net", "linear_twin", "hybrid", "transformer", "routed", "routed_delta", "no_gate"],
)


def tokens(rows: int, time: int, seed: int = 1) -> torch.Tensor:
    """Ordinary tokens, none of them special."""
    return torch.randint(3, 40, (rows, time), generator=torch.Generator().manual_seed(seed))

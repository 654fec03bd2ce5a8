"""Tiny models of bytes, and folders of them."""

from pathlib import Path

import torch

from loglinear.models import ByteTokenizer, LogLinearConfig, LogLinearForCausalLM

LINEAR, FULL = "linear_attention", "full_attention"
KINDS = {
    "mamba2": {},
    "gated_delta_net": {"variant": "gated_delta_net"},
    "hybrid": {"variant": "gated_delta_net", "layer_types": [LINEAR, FULL]},
    "transformer": {"layer_types": [FULL, FULL]},
}


def tiny_config(**options) -> LogLinearConfig:
    defaults = dict(
        vocab_size=264,
        hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=24,
        num_heads=4,
        key_dim=8,
        head_dim=8,
        num_levels=6,
        chunk_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_head_dim=8,
        loss_chunk_size=64,
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        lambda_form="softplus",
    )
    return LogLinearConfig(**{**defaults, **options})


def tiny_model(model_class: type = LogLinearForCausalLM, **options):
    torch.manual_seed(0)
    return model_class(tiny_config(**options)).eval()


def save_tiny(folder: Path, **options) -> Path:
    """A checkpoint of a tiny language model and the byte tokenizer."""
    tiny_model(**options).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder

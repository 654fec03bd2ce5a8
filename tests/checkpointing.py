"""Activation checkpointing under the name that this version of transformers wants."""

from typing import Any


def recompute_blocks(model: Any, **options: Any) -> None:
    """Let a model compute each block again in the backward pass. `options` are those of torch's checkpoint."""
    if hasattr(model, "activation_checkpointing_enable"):  # 5.23 warns of the older name
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None)

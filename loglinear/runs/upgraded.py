"""Upgraded models of transformers from folders. No code of a folder runs, and no server is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from loglinear.autoload.configuration import UpgradeConfig
from loglinear.runs.foreign import check_settings, loading_options, weight_files
from loglinear.runs.json_files import read_object
from loglinear.upgrades.checkpoint import config_from

REFUSED = ("implementation", "quantization_config")
"""Parts of the names of fields that could fetch code, or whose weights are not plain tensors."""


def is_upgraded(checkpoint: Path) -> bool:
    """Return True if a folder holds an upgraded model of transformers."""
    return read_object(checkpoint / "config.json").get("model_type") == UpgradeConfig.model_type


def upgraded_config(checkpoint: Path) -> PreTrainedConfig:
    """Return the configuration of the upgraded language model of a folder.

    Raises ValueError, in one line, for a folder that holds no such model.
    """
    file = checkpoint / "config.json"
    _refuse_fields(file, read_object(file))
    try:
        values, _ = PreTrainedConfig.get_config_dict(checkpoint, local_files_only=True)
        config = config_from(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} describes no model: {_first(error)}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"checkpoint {checkpoint} holds a {config.model_type!r} model, expected a language model")
    return config


def load_upgraded(checkpoint: Path, device: str | torch.device) -> PreTrainedModel:
    """Return the upgraded language model of a folder, in evaluation mode.

    Raises ValueError, in one line, for a folder that holds no such model or other weights than its config.json says.
    """
    config = upgraded_config(checkpoint)
    check_settings(checkpoint)
    weight_files(checkpoint)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint, **loading_options(config, device), output_loading_info=True
        )
    except RuntimeError as error:  # transformers lists weights of other shapes in many lines
        raise ValueError(
            f"checkpoint {checkpoint} holds other weights than config.json says: {_first(error)}"
        ) from None
    model, found = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[kind]:
            name = sorted(map(str, found[kind]))[0]
            raise ValueError(
                f"checkpoint {checkpoint} holds other weights than config.json says: {name} is {kind.split('_')[0]}"
            )
    return model.eval()


def _refuse_fields(where: Path, values: Any) -> None:
    """Raise ValueError for a field, at any depth, that could fetch code."""
    items = values.items() if isinstance(values, dict) else ()
    for name, value in items:
        if value is not None and any(part in name for part in REFUSED):
            raise ValueError(
                f"{where}: {name} = {value!r:.80} is not what an upgrade writes, so the folder is not loaded"
            )
        _refuse_fields(where, value)


def _first(error: Exception) -> str:
    """Return the first line of an error."""
    return next(iter(str(error).splitlines()), type(error).__name__)

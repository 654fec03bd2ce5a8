"""Models and tokenizers from checkpoints. No code of a checkpoint runs, and no server is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from loglinear.data.tokenizer import load_tokenizer
from loglinear.layers.former_names import current_name
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.runs.checkpoints import note_unlisted, resolve
from loglinear.runs.foreign import check_settings, loading_options, read_config, weight_files
from loglinear.runs.upgraded import is_upgraded, load_upgraded


def load_model(path: Path | str, *, device: str | torch.device = "cpu") -> Any:
    """Return the model of a checkpoint, or of a run's last checkpoint, in evaluation mode.

    It is a `LogLinearForCausalLM`, or an upgraded model of transformers. No code of the folder runs, and no server is
    asked. Raises ValueError, in one line, for a checkpoint that is missing, damaged or of another model, and for
    content that this library does not write (`loglinear.runs.foreign`).
    """
    checkpoint = resolve(path)
    model = _load_model(checkpoint, device)
    note_unlisted(checkpoint)
    return model


def load_checkpoint(path: Path | str, *, device: str | torch.device = "cpu") -> tuple[Any, PreTrainedTokenizerBase]:
    """Return the model and the tokenizer of a checkpoint, which is checked once for both.

    Raises ValueError as `load_model` does, and if the tokenizer is missing or has more tokens than the model.
    """
    checkpoint = resolve(path)
    model = _load_model(checkpoint, device)
    tokenizer = load_tokenizer(checkpoint, model.get_input_embeddings().num_embeddings)
    note_unlisted(checkpoint)
    return model, tokenizer


def _load_model(checkpoint: Path, device: str | torch.device) -> Any:
    if is_upgraded(checkpoint):
        with without_bars():
            return load_upgraded(checkpoint, device)
    config = own_config(checkpoint)
    check_settings(checkpoint)
    check_weights(checkpoint, config, described_by="its config.json")
    with without_bars():
        model = LogLinearForCausalLM.from_pretrained(checkpoint, **loading_options(config, device))
    return model.eval()


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide transformers' progress bars in this context: weights load and save in a moment."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def own_config(checkpoint: Path) -> LogLinearConfig:
    """Return the configuration of a checkpoint of this library; ValueError, in one line, if it holds none."""
    fields = read_config(checkpoint)
    try:
        return LogLinearConfig.from_dict(fields)
    except (ValueError, TypeError, AttributeError) as error:  # the latter two come from fields of transformers
        raise ValueError(f"{checkpoint / 'config.json'} describes no model: {error}") from error


def check_weights(checkpoint: Path, config: LogLinearConfig, *, described_by: str) -> None:
    """Raise ValueError unless names and shapes of the stored weights are those of the configuration's model.

    transformers itself would drop misfitting weights, or initialise them again. `described_by` names the owner of the
    configuration in the error.
    """
    stored: dict[str, list[int]] = {}
    for file in weight_files(checkpoint):
        with safe_open(file, framework="pt") as weights:
            stored |= {current_name(name): weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    model = _described(config, described_by, len(stored))
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    differing = [name for name in expected if name not in tied and stored.get(name) != expected[name]]
    differing += [name for name in stored if name not in expected]
    if differing:
        name = differing[0]
        raise ValueError(
            f"checkpoint {checkpoint} holds the weights of another model than {described_by} says: {name} is "
            f"{stored.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
        )


def _described(config: LogLinearConfig, described_by: str, tensors: int) -> LogLinearForCausalLM:
    """Return the model of a configuration, without memory for its weights."""
    if config.num_hidden_layers > tensors:  # refused before their modules are made: each layer has weights of its own
        raise ValueError(f"{described_by} has {config.num_hidden_layers:,} layers, and there are {tensors} weights")
    try:
        with torch.device("meta"):
            return LogLinearForCausalLM(config)
    except RuntimeError as error:
        raise ValueError(f"{described_by} describes a model of impossible size: {error}") from error

"""The new checkpoint: a model of ours from converted tensors, in a folder that appears whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loglinear.data.tokenizer import has_vocabulary
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.runs.files import sync, writing
from loglinear.runs.foreign import unused_settings
from loglinear.runs.json_files import read_object, write_object
from loglinear.runs.loading import without_bars
from loglinear.runs.manifest import write_manifest
from loglinear.variants import HeadBias

NEUTRAL = (".level_scales.", ".bucket_weights.")  # modules whose zeros give every bucket the weight 1
DEFAULT_LEVELS = 15  # of a linear model: those of the published models
CHOICES = ("num_levels", "lambda_form", "radix", "finest_block", "largest_block", "routing")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)


class Converted(NamedTuple):
    """A foreign model in our terms."""

    fields: dict[str, Any]
    """Fields of `LogLinearConfig`; those of the levels only if the model is log-linear already."""
    weights: dict[str, Tensor]
    """Tensors under our names; without the level weights of a linear model."""
    notes: list[str]
    """Sentences about values that a user may not expect."""


def configuration(fields: dict[str, Any], levels: dict[str, Any]) -> LogLinearConfig:
    """Return the configuration of a converted model.

    `levels` holds the caller's choices, fields of `LogLinearConfig`. Raises ValueError for levels that contradict a
    log-linear model, or that would change the logits of a linear one.
    """
    for name in levels:
        if name not in CHOICES:
            raise ValueError(f"levels are chosen by {', '.join(CHOICES)}, got {name!r}")
    if "num_levels" in fields:
        config = LogLinearConfig(**fields)
        for name, value in levels.items():
            if value != getattr(config, name):
                raise ValueError(
                    f"{name} must be left out or be {getattr(config, name)!r}, which the checkpoint has, got {value!r}"
                )
        return config
    form = levels.get("lambda_form", "unit")
    if form != "unit" and levels.get("num_levels") != 1:
        raise ValueError(f"lambda_form must be 'unit', the one in which the logits stay the same, got {form!r}")
    return LogLinearConfig(**{**fields, "num_levels": DEFAULT_LEVELS, **levels, "routing_tau": 0.0})


def build(config: LogLinearConfig, converted: Converted) -> LogLinearForCausalLM:
    """Return the model of a configuration with the converted weights and neutral level weights.

    Values per head are float32 or wider, as everywhere. All others get one dtype, which holds each of them exactly.
    """
    with torch.device("meta"):
        model = LogLinearForCausalLM(config)
    expected = model.state_dict()
    per_head = {
        f"{module}.{name}"
        for module, part in model.named_modules()
        if isinstance(part, HeadBias)
        for name, _ in part.named_parameters(recurse=False)
    }
    weights = dict(converted.weights)
    dtypes = [tensor.dtype for name, tensor in weights.items() if name not in per_head]
    dtype = dtypes[0]
    for other in dtypes:
        dtype = torch.promote_types(dtype, other)
    if set(dtypes) != {dtype}:
        converted.notes.append(f"the weights have several dtypes; all are stored as {dtype}, which holds them exactly")
    wide = torch.promote_types(dtype, torch.float32)
    for name, tensor in expected.items():
        if name not in weights and any(part in name for part in NEUTRAL):
            weights[name] = torch.zeros(tensor.shape)
    weights = {name: tensor.to(wide if name in per_head else dtype).contiguous() for name, tensor in weights.items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval()


def write(model: PreTrainedModel, source: Path, out: Path) -> list[str]:
    """Write a checkpoint with a manifest, and the source's tokenizer if it has one, into a new folder.

    The folder appears when everything is on the disk. Return notes for the user: about settings of generation that our
    commands do not use, and about a source without a tokenizer. Raises OSError, in one line, if the disk refuses; then
    nothing is left.
    """
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            folder = staging / out.name
            with without_bars():
                model.save_pretrained(folder)  # type: ignore[call-arg, arg-type]  # wrapped, so mypy counts `self`
            _copy_tokenizer(source, folder)
            write_manifest(folder)
            if out.exists():
                out.rmdir()  # an empty one
            folder.rename(out)
            sync(out.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    notes = [unused] if (unused := unused_settings(out)) else []
    if not has_vocabulary(out):
        notes.append(f"{source} has no tokenizer files: copy tokenizer.json and tokenizer_config.json into {out}")
    return notes


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files. A tokenizer that names no class gets the general one of transformers.

    Else transformers would look for the class of the model, and find that of the byte tokenizer.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").is_file():
        values = read_object(config) if config.is_file() else {}
        if values.get("tokenizer_class") is None:
            write_object(config, {**values, "tokenizer_class": "PreTrainedTokenizerFast"})

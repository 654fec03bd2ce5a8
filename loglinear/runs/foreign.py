"""Checkpoints of unknown origin: loading one runs no code of it, imports nothing that it names and asks no server.

Only files that this library writes are read: fields of `LogLinearConfig`, and safetensors in the folder itself.
"""

from __future__ import annotations

import logging
import math
from inspect import get_annotations
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from loglinear.models import LogLinearConfig
from loglinear.processes import is_main_process
from loglinear.runs.json_files import fits, read_object, type_name
from loglinear.upgrades.families import FAMILIES

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.ckpt", "*.pkl")  # weights of other libraries
DTYPES = ("float64", "float32", "bfloat16", "float16")
# Notes about a checkpoint, which loading ignores.
NOTES = {"model_type", "architectures", "transformers_version", "_name_or_path"}
# Settings of generation that every command overrides, and notes.
GENERATION = {
    "_from_model_config",
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict_in_generate",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "max_length",
    "max_new_tokens",
}

logger = logging.getLogger(__name__)


def read_config(checkpoint: Path) -> dict[str, Any]:
    """Return the fields of config.json without the notes.

    Raises ValueError for a model of another type. Raises it also for an unknown field and for a
    value of the wrong type or not finite. A field of transformers must have the value that this library writes.
    """
    file = checkpoint / "config.json"
    values = read_object(file)
    if values.get("model_type") != LogLinearConfig.model_type:
        raise ValueError(f"checkpoint {checkpoint} holds a {_foreign(values.get('model_type'))}")
    hints = get_annotations(LogLinearConfig, eval_str=True)
    ours = LogLinearConfig().to_dict()
    fields = {name: value for name, value in values.items() if name not in NOTES}
    for name, value in fields.items():
        if name in ("dtype", "torch_dtype"):
            if value not in (*DTYPES, None):
                raise ValueError(f"{file}: {name} must be one of {', '.join(DTYPES)}, got {value!r}")
        elif name in hints and name != "auto_map":
            if not fits(value, hints[name]) or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(f"{file}: {name} must be {type_name(hints[name])}, got {value!r}")
        elif name not in ours or value != ours[name]:
            raise ValueError(f"{file}: {name} = {value!r} is not what loglinear writes, so the folder is not loaded")
    return fields


def _foreign(kind: Any) -> str:
    """Return what a folder holds that is not ours, and the command that makes it ours."""
    if kind == "mamba2":  # the one that both commands read
        return "'mamba2' model of transformers: use `loglinear upgrade` or `loglinear convert` first"
    if is_upgradable(kind):
        return f"{kind!r} model of transformers: use `loglinear upgrade` first"
    if kind in CONFIG_MAPPING:
        return f"{kind!r} model, expected {LogLinearConfig.model_type!r}"
    return f"{kind!r} model of another library: use `loglinear convert` first"


def is_upgradable(kind: Any) -> bool:
    """Return True if a model_type is that of a model of transformers with layers that can be upgraded."""
    return str(kind).removesuffix("_text") in FAMILIES.values()


def check_settings(checkpoint: Path) -> None:
    """Raise ValueError for an adapter, which would change the model. Note settings of generation that we do not use."""
    if (checkpoint / "adapter_config.json").exists():
        raise ValueError(f"checkpoint {checkpoint} holds an adapter: merge it into its model, and save that")
    if unused := unused_settings(checkpoint):
        note(unused)


def unused_settings(folder: Path) -> str | None:
    """Return a sentence about the settings of generation in a folder that no command uses; None if there are none."""
    file = folder / "generation_config.json"
    values = read_object(file) if file.is_file() else {}
    unused = [f"{name} = {value!r:.80}" for name, value in sorted(values.items()) if name not in GENERATION]
    if not unused:
        return None
    return f"{file} sets {', '.join(unused)}, which transformers' `generate` uses and the commands of loglinear do not"


def stored_settings(folder: Path) -> GenerationConfig | None:
    """Return the settings of generation in a folder's own file, for a new folder made of it; None without the file.

    Raises ValueError, in one line, for a file that transformers cannot read.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    try:
        return GenerationConfig.from_dict(read_object(file))
    except (ValueError, TypeError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{file} holds settings that transformers cannot read: {reason}") from error


def note(text: str) -> None:
    """Write a note for the user, once for all processes."""
    if is_main_process():
        logger.warning("note: %s", text)


def generation_settings(config: PreTrainedConfig) -> GenerationConfig:
    """Return the settings of generation that follow from a configuration, with a cache.

    The Trainer of transformers writes use_cache=False into the configuration that it trains, and save_pretrained keeps
    it. Without a cache every new token would cost a pass over the whole sequence.
    """
    settings = GenerationConfig.from_model_config(config)
    settings.use_cache = True
    return settings


def loading_options(config: PreTrainedConfig, device: str | torch.device) -> dict[str, Any]:
    """Return the options of `from_pretrained` for a folder: its own files, no pickle and no code of others."""
    return dict(
        config=config,
        generation_config=generation_settings(config),
        device_map={"": torch.device(device)},
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )


def weight_files(checkpoint: Path) -> list[Path]:
    """Return the files of the weights: one, or those of an index.

    Raises ValueError if there are none, and for an index that names anything but safetensors in its own folder.
    """
    if (checkpoint / WEIGHTS).is_file():
        return [checkpoint / WEIGHTS]
    index = checkpoint / INDEX
    if not index.is_file():
        raise ValueError(f"checkpoint {checkpoint} holds neither {WEIGHTS} nor {INDEX}{pickled(checkpoint)}")
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} has no 'weight_map' object")
    files = []
    for name in sorted(set(map(str, names.values()))):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}, expected a .safetensors file in its own folder")
        if not (checkpoint / name).is_file():
            raise ValueError(f"{index} names {name}, which is missing")
        files.append(checkpoint / name)
    return files


def hub_hint(path: Path) -> str:
    """Return how to download a model that is named as on the Hugging Face hub, or an empty text."""
    if len(path.parts) != 2 or path.is_absolute() or path.parent.exists():
        return ""
    return f"; a model of the Hugging Face hub is not downloaded: `hf download {path} --local-dir FOLDER` first"


def pickled(checkpoint: Path) -> str:
    """Return the reason why existing weights are not read, or an empty text. It follows an error's text."""
    pickles = sorted(path.name for pattern in PICKLES for path in checkpoint.glob(pattern))
    return f"; {pickles[0]} is not read, because it could run code" if pickles else ""

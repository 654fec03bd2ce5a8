"""Files of the new parameters alone, small enough to share without the model that they belong to."""

import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

from loglinear.models.configuration import current_fields
from loglinear.upgrades.checkpoint import BASE, ENTRY, TRAINED
from loglinear.upgrades.in_place import UpgradeReport, new_parameters, upgrade

WRAPPERS = ("_orig_mod", "module")  # the names under which torch.compile, and DDP and others, hold a model


def save_upgrade(model: nn.Module, path: str | os.PathLike) -> None:
    """Save the new parameters of an upgraded model, and how it was upgraded, to one safetensors file.

    The model may be compiled, in DistributedDataParallel or sharded by `fully_shard`. Every process calls this
    function, and the first one writes the file.

    Raises:
        ValueError: The model is not upgraded, has adapters of PEFT, or its parameters are not in memory.
    """
    if any(".modules_to_save." in name or "lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("model has adapters of PEFT: merge them with merge_and_unload(), or save the PEFT model")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError("model is flattened by FullyShardedDataParallel: save the whole model, or use fully_shard")
    inner = unwrapped(model)
    new = new_parameters(inner)
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(f"model must be an upgraded model of transformers, got {type(inner).__name__}")
    if any(parameter.is_meta for parameter in new.values()):
        raise ValueError("model must have its parameters in memory, some are offloaded")
    tensors = {name.replace("_orig_mod.", ""): whole(parameter).contiguous() for name, parameter in new.items()}
    entry = {name: value for name, value in getattr(inner.config, ENTRY).items() if name != TRAINED}
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0):
        save_file(tensors, path, metadata={ENTRY: json.dumps(entry)})


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of compilation and of data parallelism."""
    while not isinstance(model, PreTrainedModel):
        inner = [getattr(model, name) for name in WRAPPERS if name in dict(model.named_children())]
        if not inner:
            return model
        model = inner[0]
    return model


def whole(parameter: nn.Parameter) -> Tensor:
    """Return the values of a parameter, from all processes if `fully_shard` has spread them."""
    values: Any = parameter.detach()
    return values.full_tensor() if hasattr(values, "full_tensor") else values


def load_upgrade(model: PreTrainedModel, path: str | os.PathLike, **options: Any) -> UpgradeReport:
    """Upgrade a model in place as a file of `save_upgrade` says, load its parameters, and return what was done.

    Args:
        model: The original model.
        path: The file.
        options: Arguments of `upgrade` that change no result, in place of the file's: chunk_size, impl, freeze.

    Raises:
        ValueError: A file that `save_upgrade` did not write, a model of another family or other sizes, or an argument
            that the file decides. The model is then as before, but for a file with parameters of other names or sizes.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be a model of transformers, got {type(model).__name__}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path must be a file of save_upgrade, got {os.fspath(path)!r}: {error}") from None
    if ENTRY not in metadata:
        raise ValueError(f"path must be a file of save_upgrade, got {os.fspath(path)!r} without an entry {ENTRY!r}")
    entry = current_fields(json.loads(metadata[ENTRY]))
    model_type = entry.pop(BASE)
    if model_type != model.config.model_type:
        raise ValueError(f"model must be of type {model_type!r}, as the file says, got {model.config.model_type!r}")
    decided = sorted(set(options) - {"chunk_size", "impl", "freeze"})
    if decided:
        raise ValueError(f"{decided[0]} is decided by the file of the upgrade: leave it out")
    report = upgrade(model, **{**entry, **options})
    new = new_parameters(model)
    if {name: p.shape for name, p in new.items()} != {name: t.shape for name, t in tensors.items()}:
        raise ValueError(f"model must have the layers and sizes of the file {os.fspath(path)!r}, got others")
    with torch.no_grad():
        for name, parameter in new.items():
            parameter.copy_(tensors[name])
    return report._replace(trained=True)

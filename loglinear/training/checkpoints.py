"""Checkpoints on disk: finding the last whole one, saying what is wrong with a broken one, loading a model from one.

A checkpoint is a folder that `from_pretrained` reads (config.json, model.safetensors, the tokenizer) and, in a training
run's folder, the optimiser's and the schedule's state beside it.
"""

from __future__ import annotations

import zipfile
from inspect import get_annotations
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import torch
from safetensors import SafetensorError, safe_open

from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.training.json_files import read_object

MODEL_TYPE = LogLinearConfig.model_type
TRAINER_STATE = "trainer_state.json"


def checkpoints(run: Path) -> list[Path]:
    """The folders `checkpoint-STEP` of a run, oldest first, whole or not."""
    found = [path for path in run.glob("checkpoint-*") if path.is_dir() and path.name.split("-", 1)[1].isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The training step that a folder `checkpoint-STEP` was saved after."""
    return int(checkpoint.name.split("-", 1)[1])


def defect(checkpoint: Path, *, resumable: bool = False) -> str | None:
    """What keeps this folder from being a whole checkpoint, or None.

    Looks at names, headers and lengths, not at every byte. `resumable` also asks for the state of the training.
    """
    needed = ["config.json", "model*.safetensors"]
    if resumable:
        needed += [TRAINER_STATE, "optimizer.pt", "scheduler.pt", "rng_state*.pth"]
    for name in needed:
        if not any(checkpoint.glob(name)):
            return f"{name.replace('*', '')} is missing"
    for file in sorted(checkpoint.glob("*.json")):
        try:
            read_object(file)
        except ValueError:
            return f"{file.name} is truncated or no JSON object"
    if resumable and read_object(checkpoint / TRAINER_STATE).get("global_step") != step_of(checkpoint):
        return f"{TRAINER_STATE} is of another step"
    for file in sorted(checkpoint.glob("*.pt*")) if resumable else []:
        if not zipfile.is_zipfile(file):
            return f"{file.name} is truncated"
    for file in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return f"{file.name} is truncated"
    return None


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run that training can go on from; one that is not whole is passed over."""
    whole = (path for path in reversed(checkpoints(run)) if defect(path, resumable=True) is None)
    return next(whole, None)


def resolve(path: Path | str) -> Path:
    """The checkpoint meant by `path`: itself, or the newest whole one where `path` is a training run's folder.

    Raises ValueError where there is none or it is not whole.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no checkpoint at {path}: expected a checkpoint folder or the folder of a training run")
    if (path / "config.json").is_file():
        if problem := defect(path):
            raise ValueError(f"checkpoint {path} is not whole: {problem}")
        return path
    found = checkpoints(path)
    for checkpoint in reversed(found):
        if defect(checkpoint) is None:
            return checkpoint
    if found:
        raise ValueError(f"checkpoint {found[-1]} is not whole: {defect(found[-1])}")
    raise ValueError(f"no checkpoint in {path}: it has neither config.json nor a folder checkpoint-STEP")


def load_model(path: Path | str, *, device: str | torch.device = "cpu") -> LogLinearForCausalLM:
    """The model of a checkpoint or of a run's last checkpoint, in evaluation mode.

    Raises ValueError, in one line, for a checkpoint that is missing, truncated, or of another model.
    """
    checkpoint = resolve(path)
    config = _config(checkpoint)
    check_weights(checkpoint, config, described_by="its config.json")
    model = LogLinearForCausalLM.from_pretrained(checkpoint, device_map={"": torch.device(device)})
    return model.eval()


def _config(checkpoint: Path) -> LogLinearConfig:
    file = checkpoint / "config.json"
    values = read_object(file)
    if values.get("model_type") != MODEL_TYPE:
        raise ValueError(f"checkpoint {checkpoint} holds a {values.get('model_type')!r} model, expected {MODEL_TYPE!r}")
    for name, hint in get_annotations(LogLinearConfig, eval_str=True).items():
        if name in values and not _fits(values[name], hint):
            wanted = getattr(hint, "__name__", hint)
            raise ValueError(f"{file}: {name} must be {wanted}, got {values[name]!r}")
    try:
        return LogLinearConfig.from_pretrained(checkpoint)
    except (ValueError, TypeError, AttributeError) as error:  # the latter two: fields of transformers' own
        raise ValueError(f"{file} describes no model: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of an annotated type; int serves as float."""
    options = [get_origin(option) or option for option in (get_args(hint) if isinstance(hint, UnionType) else (hint,))]
    return isinstance(value, (*options, int) if float in options else tuple(options))


def check_weights(checkpoint: Path, config: LogLinearConfig, *, described_by: str) -> None:
    """Raise ValueError unless names and shapes of the stored weights are those of the configuration's model.

    transformers itself would leave out, or draw anew, what does not fit. `described_by` is whose configuration it is.
    """
    with torch.device("meta"):
        model = LogLinearForCausalLM(config)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    stored: dict[str, list[int]] = {}
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            stored |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118 (no dict)
    tied = set(model.all_tied_weights_keys)
    differing = [name for name in expected if name not in tied and stored.get(name) != expected[name]]
    differing += [name for name in stored if name not in expected]
    if differing:
        name = differing[0]
        raise ValueError(
            f"checkpoint {checkpoint} holds the weights of another model than {described_by} says: {name} is "
            f"{stored.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
        )

"""Checkpoints on disk: finding the last whole one, saying what is wrong with a broken one, loading a model from one.

A checkpoint is a folder that `from_pretrained` reads (config.json, model.safetensors, the tokenizer) and, in a training
run's folder, the optimiser's and the schedule's state beside it.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from loglinear.models import LogLinearConfig, LogLinearForCausalLM

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
    parsed = ["config.json", TRAINER_STATE] if resumable else ["config.json"]
    zipped = ["optimizer.pt", "scheduler.pt"] if resumable else []
    for name in parsed:
        try:
            json.loads((checkpoint / name).read_text())
        except FileNotFoundError:
            return f"{name} is missing"
        except ValueError:
            return f"{name} is truncated"
    for name in zipped:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if not zipfile.is_zipfile(checkpoint / name):
            return f"{name} is truncated"
    weights = sorted(checkpoint.glob("*.safetensors"))
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return f"{file.name} is truncated"
    return None if weights else "model.safetensors is missing"


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run that training can go on from; one that is not whole is passed over."""
    whole = (path for path in reversed(checkpoints(run)) if defect(path, resumable=True) is None)
    return next(whole, None)


def resolve(path: Path) -> Path:
    """The checkpoint meant by `path`: itself, or the newest whole one where `path` is a training run's folder.

    Raises ValueError where there is none or it is not whole.
    """
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


def load_model(path: Path, *, device: str | torch.device = "cpu") -> LogLinearForCausalLM:
    """The model of a checkpoint or of a run's last checkpoint, in evaluation mode.

    Raises ValueError, in one line, for a checkpoint that is missing, truncated, or of another model.
    """
    checkpoint = resolve(path)
    model_type = json.loads((checkpoint / "config.json").read_text()).get("model_type")
    if model_type != MODEL_TYPE:
        raise ValueError(f"checkpoint {checkpoint} holds a {model_type!r} model, expected {MODEL_TYPE!r}")
    config = LogLinearConfig.from_pretrained(checkpoint)
    _check_weights(checkpoint, config)
    model = LogLinearForCausalLM.from_pretrained(checkpoint, device_map={"": torch.device(device)})
    return model.eval()


def _check_weights(checkpoint: Path, config: LogLinearConfig) -> None:
    """Compare the names and shapes of the stored weights with the model that the configuration describes."""
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
            f"checkpoint {checkpoint} holds the weights of another model than its config.json: {name} is "
            f"{stored.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
        )

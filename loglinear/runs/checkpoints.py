"""Checkpoints on disk: find the last whole one, name the defect of a broken one.

A checkpoint is a folder that `from_pretrained` reads: config.json, model.safetensors and the tokenizer. In a training
run it also holds the state of the optimiser and of the schedule.
"""

from __future__ import annotations

import zipfile
from inspect import get_annotations
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerState

from loglinear.runs.foreign import hub_hint, note, pickled
from loglinear.runs.json_files import fits, read_object, type_name
from loglinear.runs.manifest import MANIFEST, damage

TRAINER_STATE = "trainer_state.json"
PICKLED = (".pt", ".pth", ".bin")  # files that only training reads, besides TRAINER_STATE and SHARDS
SHARDS = ("pytorch_model_fsdp_0", "optimizer_0")  # folders of torch.distributed.checkpoint, as accelerate names them


def checkpoints(run: Path) -> list[Path]:
    """Return the folders `checkpoint-STEP` of a run, oldest first, whole or not."""
    folders = [path for path in run.glob("checkpoint-*") if path.is_dir() and path.name.split("-", 1)[1].isdigit()]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step after which a folder `checkpoint-STEP` was saved."""
    return int(checkpoint.name.split("-", 1)[1])


def defect(checkpoint: Path, *, resumable: bool = False) -> str | None:
    """Return the reason why a folder is no whole checkpoint, or None.

    The files that are read are compared with the manifest byte by byte. Without a manifest only names, headers and
    lengths are checked. `resumable` also checks the state of the training and the run's files at that time.
    """
    needed = ["config.json", "model*.safetensors"]
    if resumable:
        needed += [TRAINER_STATE, "scheduler.pt", "rng_state*.pth"]
        needed += [f"{folder}/.metadata" for folder in SHARDS] if is_sharded(checkpoint) else ["optimizer.pt"]
    for name in needed:
        if not any(checkpoint.glob(name)):
            return f"{name.replace('*', '')} is missing" + (pickled(checkpoint) if name.startswith("model") else "")
    problem = None
    if is_listed(checkpoint):
        problem = damage(checkpoint, which=lambda name: resumable or not _of_training(name), with_run=resumable)
    return problem or _visible_defect(checkpoint, resumable)


def is_sharded(checkpoint: Path) -> bool:
    """Return True if the checkpoint holds weights and optimiser in shards."""
    return any((checkpoint / folder).is_dir() for folder in SHARDS)


def is_listed(checkpoint: Path) -> bool:
    """Return True if the checkpoint has a manifest, so that its contents can be checked."""
    return (checkpoint / MANIFEST).exists()


def _of_training(name: str) -> bool:
    return name == TRAINER_STATE or Path(name).suffix in PICKLED or Path(name).parts[0] in SHARDS


def _visible_defect(checkpoint: Path, resumable: bool) -> str | None:
    """Return a defect that shows without a manifest, or None."""
    for file in sorted(checkpoint.glob("*.json")):
        if not resumable and _of_training(file.name):
            continue
        try:
            values = read_object(file)
        except ValueError:
            return f"{file.name} is truncated or no JSON object"
        except OSError as error:
            return f"{file.name} cannot be read: {error.strerror}"
        if file.name == TRAINER_STATE and (problem := _state_problem(values, step_of(checkpoint))):
            return f"{file.name} {problem}"
    for file in sorted(checkpoint.glob("*.pt*")) if resumable else []:
        if not zipfile.is_zipfile(file):
            return f"{file.name} is truncated"
    for file in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except OSError as error:
            return f"{file.name} cannot be read: {error.strerror or error}"
        except SafetensorError:
            return f"{file.name} is truncated"
    return None


def _state_problem(values: dict[str, Any], step: int) -> str | None:
    """Return the defect of a Trainer's state, or None. Its callbacks are a list in memory and an object in the file."""
    hints = {**get_annotations(TrainerState, eval_str=True), "stateful_callbacks": dict}
    for name, value in values.items():
        if name not in hints:
            return f"has an unknown field {name!r}"
        if not fits(value, hints[name]):
            return f"must have {type_name(hints[name])} as {name}, got {value!r}"
    return None if values.get("global_step") == step else "is of another step"


def last_checkpoint(run: Path) -> Path | None:
    """Return the newest checkpoint from which training can resume, or None if the run has no checkpoint.

    A checkpoint that is not whole is skipped with a note. Raises ValueError if none is whole.
    """
    checkpoint = _newest_whole(run, resumable=True)
    if checkpoint is not None:
        note_unlisted(checkpoint)
    return checkpoint


def resolve(path: Path | str) -> Path:
    """Return the checkpoint at `path`: `path` itself, or the newest whole one in the folder of a training run.

    A checkpoint of a run that is not whole is skipped with a note. Raises ValueError if there is no whole checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        expected = "a checkpoint folder or the folder of a training run"
        raise ValueError(f"no checkpoint at {path}: expected {expected}{hub_hint(path)}")
    if (path / "config.json").is_file():
        if problem := defect(path):
            raise ValueError(f"checkpoint {path} is not whole: {problem}")
        return path
    if checkpoint := _newest_whole(path, resumable=False):
        return checkpoint
    raise ValueError(f"no checkpoint in {path}: it has neither config.json nor a folder checkpoint-STEP")


def _newest_whole(run: Path, *, resumable: bool) -> Path | None:
    tried: list[tuple[Path, str | None]] = []
    for checkpoint in reversed(checkpoints(run)):
        tried.append((checkpoint, defect(checkpoint, resumable=resumable)))
        if tried[-1][1] is None:
            break
    else:
        if not tried:
            return None
        raise ValueError(f"checkpoint {tried[0][0]} is not whole: {tried[0][1]}; no other one of this run is whole")
    for passed, problem in tried[:-1]:
        note(f"checkpoint {passed} is not whole: {problem}; going back to {checkpoint.name}")
    return checkpoint


def note_unlisted(checkpoint: Path) -> None:
    """Write a note for a checkpoint without a manifest, whose contents cannot be checked."""
    if not is_listed(checkpoint):
        if (checkpoint / TRAINER_STATE).exists():
            note(f"checkpoint {checkpoint} has no {MANIFEST}, so its contents were not checked")
        else:  # the folder of another program, which is no reason to worry
            note(f"{checkpoint} has no {MANIFEST}, as save_pretrained writes none: lengths were checked, checksums not")

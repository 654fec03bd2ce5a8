"""A run's folder: its lock, and run.json, which describes the run."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from transformers import PreTrainedConfig

from loglinear.models.configuration import current_fields
from loglinear.recipes import TrainingRecipe
from loglinear.runs.checkpoints import checkpoints
from loglinear.runs.files import staged_file
from loglinear.runs.json_files import read_sealed, write_sealed
from loglinear.runs.metrics import METRICS_FILE
from loglinear.runs.provenance import command, versions

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind, so a folder has no guard there
    fcntl = None  # type: ignore[assignment]

RUN_FILE, LOCK_FILE = "run.json", ".lock"
STAGING = ".saving"  # the folder of an unfinished checkpoint


@contextmanager
def claim(out: Path) -> Iterator[None]:
    """Lock a run's folder for this process. The operating system unlocks it when the process ends, for any reason.

    An error removes the folders and the lock that this call made, unless something else is in them.

    Raises ValueError if another process holds the lock, or if the folder cannot be made.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    is_new = not (out / LOCK_FILE).exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK_FILE).open("ab+", buffering=0)
    except OSError as error:
        raise ValueError(f"output folder {out} cannot be written: {error.strerror}") from error
    with lock:
        _hold(lock, out)
        try:
            _sign(lock, out)
            yield
        except BaseException:
            if is_new and [path.name for path in out.iterdir()] == [LOCK_FILE]:
                _remove(out / LOCK_FILE, made)
            raise


def _hold(lock: IO[bytes], out: Path) -> None:
    """Raise ValueError if another process holds the lock, or has just removed it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock.fileno()).st_nlink:
            return
    except BlockingIOError:
        pass
    lock.seek(0)
    holder = lock.read().decode(errors="replace").strip() or "unknown"
    raise ValueError(f"output folder {out} is in use by another process (pid {holder})")


def _sign(lock: IO[bytes], out: Path) -> None:
    """Write this process's number into its lock. Raises ValueError if the disk refuses."""
    lock.truncate(0)
    try:
        lock.write(str(os.getpid()).encode())
    except OSError as error:
        raise ValueError(f"output folder {out} cannot be written: {error.strerror}") from error


def _remove(lock: Path, folders: Iterable[Path]) -> None:
    """Remove a lock and these folders, the innermost first; the first that is refused stays, and all around it."""
    with suppress(OSError):
        lock.unlink()
        for folder in folders:
            folder.rmdir()


def require_folder(path: Path, option: str) -> None:
    """Raise ValueError if an option names a file where a folder is needed."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{option} must be a folder, got the file {path}")


def require_new(out: Path, name: str) -> None:
    """Raise ValueError unless a folder can be made or is empty; `name` names it in the error."""
    require_folder(out, name)
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"output folder {out} is not empty: choose another one")


def require_empty(out: Path) -> None:
    """Raise ValueError if the folder already holds something, except the remains of a failed start."""
    if (out / RUN_FILE).exists():
        raise ValueError(f"output folder {out} holds another run: add --resume to continue it, or choose another --out")
    own = {LOCK_FILE, STAGING, *(staged_file(out / name).name for name in (RUN_FILE, METRICS_FILE))}
    if any(path.name not in own for path in out.iterdir()):
        raise ValueError(f"output folder {out} is not empty: choose another --out")


def read_run(out: Path, option: str = "output folder") -> dict[str, Any]:
    """Return the content of run.json. Raises ValueError if there is no run or if the file is damaged.

    `option` names the folder in the errors, as in "--base".
    """
    if not out.exists():
        raise ValueError(f"{option} {out} does not exist, expected the folder of a training run")
    if not out.is_dir():
        raise ValueError(f"{option} must be the folder of a training run, got the file {out}")
    try:
        run = read_sealed(out / RUN_FILE)
    except FileNotFoundError:
        raise ValueError(f"{option} {out} holds no training run (no {RUN_FILE})") from None
    for name in ("recipe", "data"):
        if not isinstance(run.get(name), dict):
            raise ValueError(f"{out / RUN_FILE} has no {name!r} object, so it describes no run")
    return run


def run_recipe(out: Path, option: str = "output folder") -> TrainingRecipe:
    """Return the recipe of the run in a folder. Raises ValueError as `read_run`, or if run.json holds no usable one."""
    values = read_run(out, option)["recipe"]
    try:
        recipe = TrainingRecipe.from_dict(values)
        recipe = dataclasses.replace(recipe, model=current_fields(recipe.model))
        recipe.model_config()
    except (TypeError, ValueError) as error:  # TypeError: a field that is unknown, missing or of another type
        raise ValueError(f"{out / RUN_FILE} holds no usable recipe: {error}") from error
    return recipe


def write_run(
    out: Path, recipe: TrainingRecipe, data: dict[str, Any], *, parameters: int, model: PreTrainedConfig
) -> None:
    """Write everything that decides the result to run.json: recipe with its seed, data, versions, command.

    `model` is the configuration of the model that is trained, which may come from a folder.
    """
    write_sealed(
        out / RUN_FILE,
        {
            "recipe": recipe.to_dict(),
            "seed": recipe.seed,
            "parameters": parameters,
            "model": json.loads(model.to_json_string()),
            "data": data,
            "versions": versions(),
            "command": command(),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
    )


def check_same_recipe(out: Path, recipe: TrainingRecipe) -> None:
    """Raise ValueError, which names the difference, unless the folder's run has this recipe."""
    old, new = _flat(run_recipe(out).to_dict()), _flat(recipe.to_dict())
    changed = [name for name in old | new if old.get(name) != new.get(name)]
    if changed:
        name = "start" if "start" in changed else changed[0]  # a start brings its tokenizer and its model
        had, has = old.get(name), new.get(name)
        hint = "" if checkpoints(out) else "; it has no checkpoint yet: delete the folder to start again"
        raise ValueError(f"{out} holds a run with {name} = {had!r}, which cannot resume with {has!r}{hint}")


def check_same_data(out: Path, data: dict[str, Any]) -> None:
    """Raise ValueError unless the folder's run has this data."""
    if read_run(out)["data"] != data:
        raise ValueError(f"the data of the run in {out} has changed since it started, so it cannot resume exactly")


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe, with those of its model as `model.name`."""
    model = {f"model.{name}": value for name, value in recipe["model"].items()}
    return {name: value for name, value in recipe.items() if name != "model"} | model

"""Results: JSON files, named by model and seed, with readers that refuse to mix different runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from loglinear.cli.console import NOTHING
from loglinear.runs.json_files import read_object

SEED = r"(-seed\d+)?"  # after a name
OF_A_RUN = (
    "summary",
    "seed",
    "compile",
    "tokenizer",
    "data",
    "start",
)  # fields of a recipe that do not decide a result: words, seed, machine, folders
TRAINING_DATA = "training data"  # the name in errors of a result's "data", with its fingerprints
NEEDED = ("seed", "parameters", "versions", "recipe", "training", "evaluation")
Found = TypeVar("Found", bound=Sized)
Result = dict[str, Any]  # written by `experiments.runs.train_and_evaluate` and `experiments.rl`


class Recipe(Protocol):
    """Everything that decides a result, as a TrainingRecipe."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""


def result_file(results: Path, name: str, seed: int) -> Path:
    """Return NAME.json in the folder `results`, or NAME-seedSEED.json for another seed than 0."""
    return results / f"{name}{seed_suffix(seed)}.json"


def seed_suffix(seed: int) -> str:
    """Return the suffix of a seed in a file name, which is empty for seed 0."""
    return f"-seed{seed}" if seed else ""


def require_some(found: Found, results: Path, experiment: str) -> Found:
    """Return what was found in the folder. Raises ValueError, which names folder and command, if it is nothing."""
    if not results.is_dir():
        raise ValueError(f"--results {results} is no folder")
    if not found:
        raise ValueError(f"--results {results} has no result of `python -m experiments.{experiment} run`")
    return found


def require_replaceable(
    file: Path, recipe: Recipe, eval_settings: dict[str, Any], training_data: dict[str, Any] | None = None
) -> None:
    """Raise ValueError, which names the difference, if the file holds a result of another recipe or evaluation.

    The training data are compared too, if they are given.
    """
    if not file.exists():
        return
    ours = {**_decisive(json.loads(json.dumps(recipe.to_dict()))), **_eval_settings(eval_settings)}
    if training_data is not None:
        ours[TRAINING_DATA] = training_data
    theirs = _conditions(_read_result(file))
    if differing := _differing(ours, theirs, ours):
        raise ValueError(
            f"{file} is of a run that differs in {', '.join(differing)}: choose another --results or move the file"
        )


def read_results(results: Path, experiment: str, names: Iterable[str]) -> dict[str, Result]:
    """Return the existing results EXPERIMENT-NAME.json in the order of the names.

    Raises ValueError, which names the file, for a file that is no result.
    """
    files = {name: results / f"{experiment}-{name}.json" for name in names}
    return {name: _read_result(file) for name, file in files.items() if file.is_file()}


def read_seeds(
    results: Path, experiment: str, names: Iterable[str], *, data_of_seed: bool = False
) -> dict[str, list[Result]]:
    """Return the existing results of each name with all its seeds in order, from EXPERIMENT-NAME[-seedSEED].json.

    With `data_of_seed` each seed has training data of its own, of which only the sizes must be equal.

    Raises ValueError, which names the files, if two differ in more than the seed, or have the same seed.
    """
    runs_by_name = {}
    for name in names:
        stem = f"{experiment}-{name}"
        files = sorted(file for file in results.glob(f"{stem}*.json") if re.fullmatch(SEED, file.stem[len(stem) :]))
        runs = [_read_result(file) for file in files]
        for file, run in zip(files[1:], runs[1:], strict=True):
            ours, theirs = (_conditions(one, data_of_seed) for one in (run, runs[0]))
            if differing := _differing(ours, theirs, ours | theirs):
                raise ValueError(f"{files[0]} and {file} differ in more than the seed: in {', '.join(differing)}")
        if len({run["seed"] for run in runs}) < len(runs):
            raise ValueError(f"{', '.join(map(str, files))}: two are of the same seed")
        if runs:
            runs_by_name[name] = sorted(runs, key=lambda run: run["seed"])
    return runs_by_name


def _differing(ours: dict[str, Any], theirs: dict[str, Any], names: Iterable[str]) -> list[str]:
    return [name for name in names if ours.get(name) != theirs.get(name)]


def _decisive(recipe: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in recipe.items() if name not in OF_A_RUN}


def _conditions(result: Result, data_of_seed: bool = False) -> dict[str, Any]:
    """Return everything that must be the same in two results of one model with different seeds."""
    data = result.get("data")
    if data_of_seed and data is not None:
        data = {part: {**facts, "fingerprint": None} for part, facts in data.items()}
    evaluation = result["evaluation"]
    lengths = {task: [score["length"] for score in scores] for task, scores in evaluation.get("tasks", {}).items()}
    return {
        **_decisive(result["recipe"]),
        TRAINING_DATA: data,
        **_eval_settings(evaluation),
        "tasks": lengths,
    }


def _eval_settings(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {"evaluation data": evaluation.get("data"), "examples": evaluation.get("examples")}


def _read_result(file: Path) -> Result:
    result = read_object(file)
    if missing := [name for name in NEEDED if name not in result]:
        raise ValueError(f"{file} is no result of an experiment: it has no {missing[0]!r}")
    if wrong := [name for name in ("recipe", "training", "evaluation") if not isinstance(result[name], dict)]:
        raise ValueError(f"{file} is no result of an experiment: its {wrong[0]!r} is no object")
    return result


def mean_and_deviation(values: Sequence[float], factor: float, digits: int) -> str:
    """Return the mean of several seeds' values times a factor and, of several, their standard deviation."""
    if not values:
        return NOTHING
    mean = f"{factor * float(np.mean(values)):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {factor * float(np.std(values, ddof=1)):.{digits}f}"

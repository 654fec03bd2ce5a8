"""What the results of all drivers have in common: reading them, and the parts of a table."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from loglinear.training.json_files import read_object

GIB = 2**30
MISSING = "-"
COST_COLUMNS = ("parameters", "M tokens", "tokens/s", "minutes", "peak GiB")

SEED = r"(-seed\d+)?"  # behind a name
OF_A_RUN = ("seed", "compile", "tokenizer")  # of a recipe: what a command says of the machine and its folders
NEEDED = ("seed", "parameters", "versions", "recipe", "training", "evaluation")
Result = dict[str, Any]  # what `experiments.runs.train_and_evaluate` writes


def read_results(results: Path, experiment: str, names: Iterable[str]) -> dict[str, Result]:
    """The results EXPERIMENT-NAME.json that there are, in the order of the names.

    Raises ValueError, naming the file, where one is no result.
    """
    files = {name: results / f"{experiment}-{name}.json" for name in names}
    return {name: _read_result(file) for name, file in files.items() if file.is_file()}


def read_seeds(results: Path, experiment: str, names: Iterable[str]) -> dict[str, list[Result]]:
    """As `read_results`, each name with all its seeds in their order: those but 0 are EXPERIMENT-NAME-seedSEED.json.

    Raises ValueError, naming the files, where two differ in more than the seed, or not in it.
    """
    found = {}
    for name in names:
        stem = f"{experiment}-{name}"
        files = sorted(file for file in results.glob(f"{stem}*.json") if re.fullmatch(SEED, file.stem[len(stem) :]))
        runs = [_read_result(file) for file in files]
        for file, run in zip(files[1:], runs[1:], strict=True):
            if differing := _differing(run, runs[0]):
                raise ValueError(f"{files[0]} and {file} differ in more than the seed: in {', '.join(differing)}")
        if len({run["seed"] for run in runs}) < len(runs):
            raise ValueError(f"{', '.join(map(str, files))}: two are of the same seed")
        if runs:
            found[name] = sorted(runs, key=lambda run: run["seed"])
    return found


def _differing(a: Result, b: Result) -> list[str]:
    """Names of what makes two results of one model incomparable."""
    ours, theirs = _conditions(a), _conditions(b)
    return [name for name in ours | theirs if ours.get(name) != theirs.get(name)]


def _conditions(result: Result) -> dict[str, Any]:
    recipe = {name: value for name, value in result["recipe"].items() if name not in OF_A_RUN}
    evaluation = result["evaluation"]
    lengths = {task: [score["length"] for score in scores] for task, scores in evaluation.get("tasks", {}).items()}
    asked = {"evaluation data": evaluation.get("data"), "examples": evaluation.get("examples"), "tasks": lengths}
    return {**recipe, "training data": result.get("data"), **asked}


def _read_result(file: Path) -> Result:
    result = read_object(file)
    if missing := [name for name in NEEDED if name not in result]:
        raise ValueError(f"{file} is no result of an experiment: it has no {missing[0]!r}")
    return result


def costs(result: Result) -> list[str]:
    """The cells of COST_COLUMNS; minutes and tokens are those of training."""
    training, peak = result["training"], result["training"]["peak_bytes"]
    return [
        f"{result['parameters']:,}",
        f"{training['tokens'] / 1e6:.1f}",
        f"{training['tokens_per_second']:,.0f}",
        f"{training['minutes']:.1f}",
        MISSING if peak is None else f"{peak / GIB:.1f}",
    ]


def title(name: str) -> str:
    """A kind's name in a table."""
    return name.replace("_", "-")


def said(found: Iterable[Any], what: Callable[[Any], Any]) -> str:
    """What all results say, once; where they differ, all that they say."""
    return " or ".join(dict.fromkeys(str(what(result)) for result in found))


def conditions(models: Collection[Result]) -> str:
    """What all models of a table were trained and evaluated with."""
    length = said(models, lambda result: f"{result['recipe']['seq_len']:,}")
    seed = said(models, lambda result: result["seed"])
    device = said(models, lambda result: result["versions"]["device"])
    speed = "tokens/s of the median step, minutes of training with compilation"
    return f"Trained in windows of {length} tokens, seed {seed}, {device}; {speed}."


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column names the row."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

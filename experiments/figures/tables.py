"""The parts of a table that all experiments share."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from experiments.results import Result
from loglinear.models import LogLinearConfig
from loglinear.models.size import state_bytes

MIB, GIB = 2**20, 2**30
MISSING = "-"
COST_COLUMNS = ("parameters", "M tokens", "tokens/s", "minutes", "peak GiB", "decode state, MiB")


def costs(result: Result) -> list[str]:
    """Return the cells of COST_COLUMNS. Minutes and tokens are of training, the state is that after a window."""
    training, peak = result["training"], result["training"]["peak_bytes"]
    return [
        f"{result['parameters']:,}",
        f"{training['tokens'] / 1e6:.1f}",
        f"{training['tokens_per_second']:,.0f}",
        f"{training['minutes']:.1f}",
        MISSING if peak is None else f"{peak / GIB:.1f}",
        _state(result),
    ]


def cost_table(runs_by_name: Mapping[str, Sequence[Result]]) -> str:
    """Return a table with the `costs` of every seed of every model."""
    rows = [[name, str(run["seed"]), *costs(run)] for name, runs in runs_by_name.items() for run in runs]
    return markdown_table(["model", "seed", *COST_COLUMNS], rows)


def mean_and_seeds(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Return the mean and, of several seeds, each one. With "+" for `sign` all have their sign."""
    if not values:
        return MISSING
    mean, *seeds = (f"{value:{sign}.{digits}f}" for value in (sum(values) / len(values), *values))
    return mean if len(seeds) == 1 else f"{mean} ({', '.join(seeds)})"


def _state(result: Result) -> str:
    recipe = result["recipe"]
    if recipe.get("model"):
        size = state_bytes(LogLinearConfig(**recipe["model"]), recipe["seq_len"])
    else:  # a training that began with a model's folder; the evaluation knows linear layers, whose state never grows
        size = result["evaluation"].get("state_bytes")
    return MISSING if size is None else f"{size / MIB:.2f}"


def title(name: str) -> str:
    """Return a kind's name in a table."""
    return name.replace("_", "-")


def join_distinct(results: Iterable[Any], value_of: Callable[[Any], Any]) -> str:
    """Return the common value of all results, or all different values."""
    return " or ".join(dict.fromkeys(str(value_of(result)) for result in results))


def device_of(how: Mapping[str, Any]) -> str:
    """Return the device of a run without the number of CPU threads, which matters on a CPU alone."""
    device = how["versions"].get("device", MISSING)
    return re.sub(r", \d+ CPU threads$", "", device) if device.startswith("NVIDIA") else device


def conditions(models: Collection[Result]) -> str:
    """Return a sentence with the conditions of the training."""
    length = join_distinct(models, lambda result: f"{result['recipe']['seq_len']:,}")
    seeds = list(dict.fromkeys(str(result["seed"]) for result in models))
    seed = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(seeds[:-1])} and {seeds[-1]}"
    device = join_distinct(models, device_of)
    compiled = " with compilation" * any(result["recipe"].get("compile") for result in models)
    speed = f"Tokens/s are those of the median step, minutes those of training{compiled}"
    shared = " On shared GPUs neither compares models." if "shared" in device else ""
    return f"Trained in windows of {length} tokens with {seed} on {device}. {speed}.{shared}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a markdown table whose first column names the row."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

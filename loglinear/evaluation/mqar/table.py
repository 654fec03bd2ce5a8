"""The table from the results of cells: the best learning rate, median, range and every seed, and bytes of states."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from loglinear.evaluation.mqar.cells import RecallCell
from loglinear.evaluation.mqar.folder import ACCURACIES, COSTS, HOW, Result, cell_of
from loglinear.evaluation.mqar.models import ALL_MODELS

CELL = ("model", "dim", "learning_rate", "seed")
COLUMNS = ["dim", "model", "decode state", "KV cache", "median", "range", "each seed", "learning rate"]
MISSING = "-"


def best_learning_rate(results: Iterable[Result]) -> float:
    """Return the learning rate of a model with the best mean validation accuracy over its protocol's tuning seeds.

    A protocol without tuning seeds has the smallest seed among those that tried the most rates. If there are none of
    the tuning seeds, all seeds count. A rate with fewer seeds than another was hopeless or is not finished, and does
    not count. The smallest of equal rates wins.
    """
    by_rate: dict[float, list[float]] = {}
    pairs = [(cell_of(result), result["validation_accuracy"]) for result in results]
    tuning = _tuning_seeds([cell for cell, _ in pairs])
    for cell, accuracy in pairs:
        if cell.seed in tuning:
            by_rate.setdefault(cell.learning_rate, []).append(accuracy)
    most = max(map(len, by_rate.values()))
    means = {rate: statistics.fmean(found) for rate, found in by_rate.items() if len(found) == most}
    return min(means, key=lambda rate: (-means[rate], rate))


def promising_rates(results: Sequence[Result]) -> list[float]:
    """Return the learning rates that further tuning seeds try: all but the hopeless ones of the first seed's results.

    A rate is hopeless if its validation accuracy is more than the protocol's `hopeless` below the best.
    """
    margin = cell_of(results[0]).task.how.hopeless
    best = max(result["validation_accuracy"] for result in results)
    return [
        cell_of(result).learning_rate
        for result in results
        if margin is None or result["validation_accuracy"] >= best - margin
    ]


def _tuning_seeds(cells: Sequence[RecallCell]) -> set[int]:
    own = cells[0].task.how.tuning_seeds
    seeds = {cell.seed for cell in cells}
    if own is not None:
        return seeds.intersection(own) or seeds
    tried = Counter(seed for seed, _ in {(cell.seed, cell.learning_rate) for cell in cells})
    return {min(seeds, key=lambda seed: (-tried[seed], seed))}


def gather(results: Sequence[Result], seeds: Sequence[int] = ()) -> dict[str, Any]:
    """Return the table as plain JSON types: a row for each model and dimension, a line for each cell, and the versions.

    Mean, sample standard deviation (None for one seed), median and range are over the seeds at the best learning rate.
    Tuning seeds are not among them, except those of `seeds`, which the table asks for, in a model that tried one rate.
    A model without reported seeds has empty lists, and None in place of numbers.
    `decode_bytes` and `cache_bytes` are those of `RecallCell`.
    """
    made = [{name: result[name] for name in HOW} for result in results]
    return {
        "task": results[0]["cell"]["task"],
        "asked_seeds": [*seeds],
        "table": _rows(results, seeds),
        "cells": [_line(result) for result in results],
        "made": [how for index, how in enumerate(made) if how not in made[:index]],
    }


def rows_of(gathered: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a gathered table, computed again from its cells: earlier versions lacked some columns."""
    task = gathered["task"]
    return _rows(
        [{**line, "cell": {**{name: line[name] for name in CELL}, "task": task}} for line in gathered["cells"]],
        gathered.get("asked_seeds", ()),
    )


def _rows(results: Sequence[Result], seeds: Sequence[int]) -> list[dict[str, Any]]:
    order = [*ALL_MODELS]
    groups: dict[tuple[int, int], list[Result]] = {}
    for result in results:
        cell = cell_of(result)
        groups.setdefault((order.index(cell.model), cell.dim), []).append(result)
    return [_row(group, seeds) for _, group in sorted(groups.items())]


def _row(results: Sequence[Result], seeds: Sequence[int]) -> dict[str, Any]:
    rate = best_learning_rate(results)
    chosen = {cell.seed: r for r in results if (cell := cell_of(r)).learning_rate == rate}
    rates = sorted({cell_of(result).learning_rate for result in results})
    tuning = set(cell_of(results[0]).task.how.tuning_seeds or ())  # these choose the rate, so others are reported
    if len(rates) == 1:
        tuning -= set(seeds)
    chosen = {seed: result for seed, result in chosen.items() if seed not in tuning}
    accuracies = [result["test_accuracy"] for result in chosen.values()]
    by_pairs = [result["test_accuracy_by_pairs"] for result in chosen.values()]
    return {
        "model": cell_of(results[0]).model,
        "dim": cell_of(results[0]).dim,
        "learning_rate": rate,
        "learning_rates": rates,
        "seeds": sorted(chosen),
        "mean": statistics.fmean(accuracies) if accuracies else None,
        "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "median": statistics.median(accuracies) if accuracies else None,
        "accuracies": [chosen[seed]["test_accuracy"] for seed in sorted(chosen)],
        "decode_bytes": cell_of(results[0]).decode_bytes,
        "cache_bytes": cell_of(results[0]).cache_bytes,
        "mean_by_pairs": {
            pairs: statistics.fmean(each[pairs] for each in by_pairs) for first in by_pairs[:1] for pairs in first
        },
    }


def _line(result: Result) -> dict[str, Any]:
    cell = {name: value for name, value in result["cell"].items() if name != "task"}
    return {**cell, **{name: result[name] for name in (*ACCURACIES, *COSTS)}}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows of the table in markdown, by dimension.

    Accuracies are test accuracies in percent. Sizes are those of the float32 state of one sequence and of the KV cache
    of the attention model. A star marks a model that has not yet tried all learning rates of the others. A model
    without reported seeds has no accuracies.
    """
    rates = {rate for row in rows for rate in row["learning_rates"]}
    lines = [COLUMNS, ["---:", "---", *["---:"] * (len(COLUMNS) - 2)]]
    for row in sorted(rows, key=lambda row: row["dim"]):
        star = "" if rates == set(row["learning_rates"]) else " *"
        seeds = row["accuracies"]
        lines.append(
            [
                str(row["dim"]),
                row["model"] + star,
                MISSING if row["decode_bytes"] is None else _kib(row["decode_bytes"]),
                _kib(row["cache_bytes"]),
                _percent(row["median"]) if seeds else MISSING,
                f"{_percent(min(seeds))} to {_percent(max(seeds))}" if len(seeds) > 1 else MISSING,
                ", ".join(map(_percent, seeds)) or MISSING,
                f"{row['learning_rate']:g}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _kib(size: int) -> str:
    return f"{size / 1024:.1f} KiB"

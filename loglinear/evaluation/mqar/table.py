"""The table from the results of cells: the best learning rate, mean and standard deviation over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from loglinear.evaluation.mqar.folder import ACCURACIES, COSTS, HOW, Result, cell_of
from loglinear.recipes.mqar import RecallCell
from loglinear.recipes.mqar_models import ALL_MODELS


def best_learning_rate(results: Iterable[Result]) -> float:
    """Return the learning rate of a model with the best mean validation accuracy over its protocol's tuning seeds.

    If there are none of these seeds, all seeds count. The smallest of equal rates wins.
    """
    by_rate: dict[float, list[float]] = {}
    pairs = [(cell_of(result), result["validation_accuracy"]) for result in results]
    tuning = _tuning_seeds([cell for cell, _ in pairs])
    for cell, accuracy in pairs:
        if cell.seed in tuning:
            by_rate.setdefault(cell.learning_rate, []).append(accuracy)
    return min(by_rate, key=lambda rate: (-statistics.fmean(by_rate[rate]), rate))


def _tuning_seeds(cells: Sequence[RecallCell]) -> set[int]:
    own = cells[0].task.how.tuning_seeds
    seeds = {cell.seed for cell in cells}
    return {min(seeds)} if own is None else seeds.intersection(own) or seeds


def gather(results: Sequence[Result]) -> dict[str, Any]:
    """Return the table as plain JSON types: a row for each model and dimension, a line for each cell, and the versions.

    Mean and sample standard deviation (None for one seed) are over the seeds at the best learning rate.
    """
    order = [*ALL_MODELS]
    groups: dict[tuple[int, int], list[Result]] = {}
    for result in results:
        cell = cell_of(result)
        groups.setdefault((order.index(cell.model), cell.dim), []).append(result)
    made = [{name: result[name] for name in HOW} for result in results]
    return {
        "task": results[0]["cell"]["task"],
        "table": [_row(group) for _, group in sorted(groups.items())],
        "cells": [_line(result) for result in results],
        "made": [how for index, how in enumerate(made) if how not in made[:index]],
    }


def _row(results: Sequence[Result]) -> dict[str, Any]:
    rate = best_learning_rate(results)
    chosen = {cell.seed: r for r in results if (cell := cell_of(r)).learning_rate == rate}
    if (
        own := cell_of(results[0]).task.how.tuning_seeds
    ) is not None:  # these chose the rate, so other seeds are reported
        chosen = {seed: r for seed, r in chosen.items() if seed not in own} or chosen
    accuracies = [result["test_accuracy"] for result in chosen.values()]
    by_pairs = [result["test_accuracy_by_pairs"] for result in chosen.values()]
    return {
        "model": cell_of(results[0]).model,
        "dim": cell_of(results[0]).dim,
        "learning_rate": rate,
        "learning_rates": sorted({cell_of(result).learning_rate for result in results}),
        "seeds": sorted(chosen),
        "mean": statistics.fmean(accuracies),
        "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "median": statistics.median(accuracies),
        "accuracies": [chosen[seed]["test_accuracy"] for seed in sorted(chosen)],
        "mean_by_pairs": {pairs: statistics.fmean(each[pairs] for each in by_pairs) for pairs in by_pairs[0]},
    }


def _line(result: Result) -> dict[str, Any]:
    cell = {name: value for name, value in result["cell"].items() if name != "task"}
    return {**cell, **{name: result[name] for name in (*ACCURACIES, *COSTS)}}


def markdown(table: dict[str, Any]) -> str:
    """Return the table in markdown: rows are dimensions, columns are models.

    A cell is the mean test accuracy in percent (standard deviation over seeds), or '-'. A star marks a model that has
    not yet tried all learning rates of the others.
    """
    rows = table["table"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    rates = {rate for row in rows for rate in row["learning_rates"]}
    texts = {
        (row["dim"], row["model"]): _percent(row) + ("" if rates == set(row["learning_rates"]) else " *")
        for row in rows
    }
    lines = [["dim", *models], ["---", *["---:"] * len(models)]]
    for dim in sorted({row["dim"] for row in rows}):
        lines.append([str(dim), *(texts.get((dim, model), "-") for model in models)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(row: dict[str, Any]) -> str:
    spread = "" if row["std"] is None else f" ({100 * row['std']:.1f})"
    return f"{100 * row['mean']:.1f}{spread}"

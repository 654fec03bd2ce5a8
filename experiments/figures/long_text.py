"""Language modelling of long texts: loss by position, differences, the course of training, and a table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures.curves import draw_differences, draw_positions, draw_training
from experiments.figures.tables import (
    COST_COLUMNS,
    MISSING,
    conditions,
    costs,
    markdown_table,
    title,
)
from experiments.recipes.comparison import KINDS
from experiments.results import Result, read_results
from loglinear.runs.files import write_atomically

REFERENCE = "linear"  # the baseline of all differences


def long_text(results: Path, out: Path) -> list[Path]:
    """Draw loss by position, its difference from the linear model's and the training losses; write long-text.md."""
    by_name = read_results(results, "long-text", KINDS)
    if not by_name:
        return []
    table = out / "long-text.md"
    write_atomically(table, perplexity_table(by_name, "model", REFERENCE))
    length = next(iter(by_name.values()))["recipe"]["seq_len"]
    longest = {kind: max(windows(result).items())[1] for kind, result in by_name.items()}
    curves = {kind: window["by_position"] for kind, window in longest.items()}
    training = {kind: result["training"]["curve"] for kind, result in by_name.items()}
    written = [table, *draw_positions(out / "long-text-positions.svg", curves, training_length=length)]
    written += draw_training(out / "long-text-training.svg", training)
    if REFERENCE in longest and len(longest) > 1:
        base = longest[REFERENCE]["by_document"]
        less = {kind: difference(longest[kind]["by_document"], base) for kind in longest if kind != REFERENCE}
        written += draw_differences(
            out / "long-text-differences.svg", less, reference=REFERENCE, training_length=length
        )
    return written


def perplexity_table(by_name: dict[str, Result], column: str, reference: str) -> str:
    """Return the table of bits per byte for each length of windows, the differences from the baseline, and the costs.

    Raises ValueError if two results have different documents.
    """
    first = next(iter(by_name.values()))
    lengths = sorted(windows(first))
    header = [
        column,
        *(f"bits per byte, windows of {length:,}" for length in lengths),
        *(f"minus {title(reference)}, {length:,}" for length in lengths),
        *COST_COLUMNS,
    ]
    base = windows(by_name[reference]) if reference in by_name else {}
    rows = []
    for name, result in by_name.items():
        own = windows(result)
        bits = [f"{own[length]['bits_per_byte']:.4f}" for length in lengths]
        compared = base if name != reference else {}
        differences = [_paired(own[length], compared[length]) if compared else MISSING for length in lengths]
        rows.append([title(name), *bits, *differences, *costs(result)])
    note = (
        f"{first['evaluation']['documents']} validation documents, the first {max(lengths):,} tokens of each. "
        f"{conditions(by_name.values())} Differences have the standard error over paired documents."
    )
    return f"{markdown_table(header, rows)}\n{note}\n"


def windows(result: Result) -> dict[int, dict[str, Any]]:
    """Return the evaluations of a result by the length of their windows."""
    return {int(length): window for length, window in result["evaluation"].items() if length.isdigit()}


def difference(model: dict[str, Any], reference: dict[str, Any]) -> dict[str, list[float]]:
    """Return the curve of a model's `Perplexity.by_document` minus another's, with the error over paired documents.

    Raises ValueError if they have different documents.
    """
    means_P, errors_P = _mean_and_error(_differences_DP(model, reference))
    return {
        "position": reference["position"],
        "bits_per_byte": means_P.tolist(),
        "standard_error": errors_P.tolist(),
    }


def _paired(window: dict[str, Any], reference: dict[str, Any]) -> str:
    mean, error = _mean_and_error(_differences_DP(window["by_document"], reference["by_document"]).mean(1))
    return f"{mean:+.4f} ± {error:.4f}"


def _differences_DP(model: dict[str, Any], reference: dict[str, Any]) -> np.ndarray:
    if any(model[name] != reference[name] for name in ("documents", "position")):
        raise ValueError("results of different validation texts cannot be compared: run all models on the same")
    return np.array(model["bits_per_byte"], dtype=float) - np.array(reference["bits_per_byte"], dtype=float)


def _mean_and_error(values_D: np.ndarray) -> tuple[Any, Any]:
    documents = len(values_D)
    error = values_D.std(0, ddof=1) / math.sqrt(documents) if documents > 1 else np.full_like(values_D[0], math.nan)
    return values_D.mean(0), error

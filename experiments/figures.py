"""Every figure and table of the experiments, from the JSON files that they wrote.

python -m experiments.figures
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from loglinear.cli import execute
from loglinear.evaluation.plots import plot_differences, plot_losses, plot_positions
from loglinear.recipes.comparison import KINDS
from loglinear.training.json_files import read_object, write_atomically

REFERENCE = "linear"  # the model that the others are compared with
GIB = 2**30

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def long_text(results: Path, out: Path) -> None:
    """Loss by position, its difference from the linear model's, the training losses, and a table."""
    found = read_kinds(results, "long-text")
    if not found:
        return
    length = next(iter(found.values()))["recipe"]["seq_len"]
    longest = {kind: max(_windows(result).items())[1] for kind, result in found.items()}
    curves = {kind: window["by_position"] for kind, window in longest.items()}
    plot_positions(out / "long-text-positions.png", curves, training_length=length)
    plot_losses(out / "long-text-training.png", {kind: result["training"]["curve"] for kind, result in found.items()})
    if REFERENCE in longest:
        reference = longest[REFERENCE]["by_document"]
        differences = {kind: difference(window["by_document"], reference) for kind, window in longest.items()}
        plot_differences(out / "long-text-differences.png", differences, reference=REFERENCE, training_length=length)
    write_atomically(out / "long-text.md", _long_text_table(found, length))


FIGURES: tuple[Callable[[Path, Path], None], ...] = (long_text,)  # each draws what it finds results of


def read_kinds(results: Path, experiment: str) -> dict[str, dict[str, Any]]:
    """The results EXPERIMENT-KIND.json that there are, in the order of KINDS."""
    files = {kind: results / f"{experiment}-{kind}.json" for kind in KINDS}
    return {kind: read_object(file) for kind, file in files.items() if file.is_file()}


def difference(model: dict[str, Any], reference: dict[str, Any]) -> dict[str, list[float]]:
    """Curve of one model's `Perplexity.by_document` less another's, with the standard error of the paired documents.

    Raises ValueError where they are not of the same documents.
    """
    if any(model[name] != reference[name] for name in ("documents", "position")):
        raise ValueError("results of different validation texts cannot be compared: run all models on the same")
    bits_DP = np.array(model["bits_per_byte"], dtype=float) - np.array(reference["bits_per_byte"], dtype=float)
    means_P, errors_P = _mean_and_error(bits_DP)
    return {
        "position": reference["position"],
        "bits_per_byte": means_P.tolist(),
        "standard_error": errors_P.tolist(),
    }


def _mean_and_error(values_D: np.ndarray) -> tuple[Any, Any]:
    documents = len(values_D)
    error = values_D.std(0, ddof=1) / math.sqrt(documents) if documents > 1 else np.full_like(values_D[0], math.nan)
    return values_D.mean(0), error


def _windows(result: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The evaluations of a result by the length of their windows."""
    return {int(length): window for length, window in result["evaluation"].items() if length.isdigit()}


def _long_text_table(found: dict[str, dict[str, Any]], length: int) -> str:
    lengths = sorted(_windows(next(iter(found.values()))))
    header = [
        "model",
        "parameters",
        *(f"bits per byte, windows of {length:,}" for length in lengths),
        *(f"less {REFERENCE}'s, {length:,}" for length in lengths),
        "tokens/s",
        "GPU minutes",
        "peak GiB",
    ]
    rows = [header, ["---"] * len(header)]
    for kind, result in found.items():
        windows, training = _windows(result), result["training"]
        peak = training["peak_bytes"]
        rows.append(
            [
                kind.replace("_", "-"),
                f"{result['parameters']:,}",
                *(f"{windows[length]['bits_per_byte']:.4f}" for length in lengths),
                *(_paired(windows[length], found, length) for length in lengths),
                f"{training['tokens_per_second']:,.0f}",
                f"{training['minutes']:.1f}",
                "" if peak is None else f"{peak / GIB:.1f}",
            ]
        )
    first = next(iter(found.values()))
    note = (
        f"{first['evaluation']['documents']} validation documents, the first {max(lengths):,} tokens of each; trained "
        f"on {first['training']['tokens']:,} tokens in windows of {length:,}, seed {first['seed']}, "
        f"{first['versions']['device']}. Differences: ± the standard error over paired documents."
    )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{note}\n"


def _paired(window: dict[str, Any], found: dict[str, dict[str, Any]], length: int) -> str:
    if REFERENCE not in found:
        return ""
    reference = _windows(found[REFERENCE])[length]
    if window is reference:
        return ""
    own, others = (np.array(of["by_document"]["bits_per_byte"], dtype=float).mean(1) for of in (window, reference))
    mean, error = _mean_and_error(own - others)
    return f"{mean:+.4f} ± {error:.4f}"


@app.command()
def main(
    results: Annotated[Path, typer.Option(help="Folder of the experiments' JSON files.")] = Path("results"),
    out: Annotated[Path, typer.Option(help="Folder for figures and tables.")] = Path("docs/figures"),
) -> None:
    """Draw all figures and write all tables whose results there are.

    Example:

    python -m experiments.figures --out docs/figures
    """
    if not results.is_dir():
        raise ValueError(f"--results {results} is no folder")
    out.mkdir(parents=True, exist_ok=True)
    for draw in FIGURES:
        draw(results, out)
    print("\n".join(str(file) for file in sorted(out.iterdir())))


if __name__ == "__main__":
    execute(app, "python -m experiments.figures")

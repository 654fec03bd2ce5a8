"""Ablations of the log-linear model: a table with the difference from the published choice."""

from __future__ import annotations

from pathlib import Path

from experiments.ablations import CHOICES, DEFAULT
from experiments.figures.long_text import perplexity_table
from experiments.results import read_results
from loglinear.runs.files import write_atomically


def ablations(results: Path, out: Path) -> list[Path]:
    """Write ablations.md: bits per byte of each choice, and the difference from the published one."""
    by_name = read_results(results, "ablation", CHOICES)
    if not by_name:
        return []
    table = out / "ablations.md"
    write_atomically(table, perplexity_table(by_name, "choice", DEFAULT))
    return [table]

"""Training speed of one model size in several kinds, in one run on one machine.

    python -m benchmarks.training --lengths 16384 --lengths 65536 --out results/training.json

Every kind has the hidden size, layers and heads of a recipe; a step is forward, backward and AdamW under bf16 autocast
(float32 on a CPU) on random tokens, one row of the given length. Losses are compared first: the same weights must give
the same loss with every implementation.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.machine import about, check_options, keep
from loglinear.models import LogLinearConfig, LogLinearForCausalLM, parameter_counts
from loglinear.recipes import RECIPES, get_recipe

LOSS_BUDGET = 2e-2  # between two implementations under bf16 autocast, of a loss near log(vocabulary)


def kinds(recipe: str, device: str) -> dict[str, dict[str, Any]]:
    """name -> changes to the recipe's configuration."""
    layers = get_recipe(recipe).model_config().num_hidden_layers
    found: dict[str, dict[str, Any]] = {"log-linear, torch": {"impl": "torch"}}
    if device == "cuda":
        found = {"log-linear, triton": {"impl": "triton"}} | found
        found["linear (one level), triton"] = {"impl": "triton", "num_levels": 1}
    else:
        found["linear (one level), torch"] = {"impl": "torch", "num_levels": 1}
    return found | {"Transformer": {"layer_types": ["full_attention"] * layers}}


def build(recipe: str, changes: dict[str, Any], device: str) -> LogLinearForCausalLM:
    torch.manual_seed(0)
    with torch.device(device):
        model = LogLinearForCausalLM(LogLinearConfig(**{**get_recipe(recipe).model_config().to_dict(), **changes}))
    return model.train()


def loss_of(model: LogLinearForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=tokens.is_cuda):
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def step_of(model: LogLinearForCausalLM, tokens: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=tokens.is_cuda)

    def step() -> None:
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds_per_step(step: Callable[[], None], steps: int, device: str) -> float:
    """Median over single steps, each waited for, after two that warm up."""
    times = []
    for number in range(steps + 2):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def check(recipe: str, device: str) -> None:
    """The same weights and tokens, every implementation: the same loss."""
    tokens = torch.randint(0, 256, (1, 1000), generator=torch.Generator().manual_seed(0)).to(device)
    losses = {}
    for name, changes in kinds(recipe, device).items():
        if name.startswith("log-linear"):
            with torch.no_grad():
                losses[name] = float(loss_of(build(recipe, changes, device), tokens))
    if max(losses.values()) - min(losses.values()) > LOSS_BUDGET:
        raise SystemExit(f"implementations disagree, nothing was timed: {losses}")


def measure(
    recipe: str,
    lengths: list[int],
    steps: int,
    device: str,
    progress: Progress,
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """One row for each length and kind; `keep` is called after every one."""
    check(recipe, device)
    rows: list[dict[str, Any]] = []
    for length in lengths:
        tokens = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(1)).to(device)
        for name, changes in kinds(recipe, device).items():
            task = progress.add_task(f"T {length}, {name}", total=None)
            row: dict[str, Any] = {"kind": name, "T": length}
            try:
                model = build(recipe, changes, device)
                row["parameters"] = parameter_counts(model.config).total
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                row["tokens_per_second"] = length / seconds_per_step(step_of(model, tokens), steps, device)
                if device == "cuda":
                    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            except torch.cuda.OutOfMemoryError:
                row["failed"] = "out of memory"
            progress.remove_task(task)
            progress.console.print(row)
            rows.append(row)
            keep(rows)
            model = None  # type: ignore[assignment]
            if device == "cuda":
                torch.cuda.empty_cache()
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="tokens/s (GiB at the peak)")
    lengths = list(dict.fromkeys(row["T"] for row in rows))
    for column in ["", "parameters", *(f"T {length:,}" for length in lengths)]:
        table.add_column(column)
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = {row["T"]: row for row in rows if row["kind"] == kind}
        counts = {row["parameters"] for row in mine.values() if "parameters" in row}
        table.add_row(kind, f"{counts.pop():,}" if counts else "", *(cell(mine[length]) for length in lengths))
    console.print(table)


def cell(row: dict[str, Any]) -> str:
    if "failed" in row:
        return row["failed"]
    memory = f" ({row['peak_gib']:.1f})" if "peak_gib" in row else ""
    return f"{row['tokens_per_second']:,.0f}{memory}"


def main(
    recipe: Annotated[str, typer.Option(help="whose model is built")] = "small",
    lengths: Annotated[list[int] | None, typer.Option(help="tokens of one row")] = None,
    steps: Annotated[int, typer.Option(help="timed steps; the median counts")] = 5,
    out: Annotated[Path | None, typer.Option(help="write the numbers to this JSON file")] = None,
) -> None:
    """Time training steps: log-linear, linear and softmax models of one size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_options(device, out, steps=steps, lengths=min(lengths or [1]))
    if recipe not in RECIPES:
        raise typer.BadParameter(f"--recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        described = about("training", device)
        chosen = lengths or [16_384, 65_536]
        rows = measure(recipe, chosen, steps, device, progress, lambda rows: keep(out, described, rows))
    show(rows, Console(width=None if sys.stdout.isatty() else 200))


if __name__ == "__main__":
    typer.run(main)

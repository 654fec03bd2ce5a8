"""Training speed of one model size in several kinds, in one run on one machine, in eager mode and compiled (on a GPU as
CUDA graphs), as `loglinear train --compile` does.

    python -m benchmarks.training --out results/training.json

Every kind has the hidden size, layers and heads of a recipe and its number of parameters within 3 %: where its layers
have more or fewer, the width of the MLPs makes up for it. A step is forward, backward and AdamW under bf16 autocast
(float32 on a CPU) on random tokens, one packed row that holds one document. Losses are compared first: the same
weights must give the same loss with every implementation, and compiled as in eager mode. A kind that fails, or that the
time was not enough for, says so in its row and the others go on.
"""

from __future__ import annotations

import gc
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

from benchmarks.machine import about, check_options, command_line, keep
from loglinear.models import LogLinearConfig, LogLinearForCausalLM, parameter_counts
from loglinear.recipes import RECIPES, get_recipe
from loglinear.training.compilation import compile_blocks

LOSS_BUDGET = 2e-2  # between two implementations under bf16 autocast, of a loss near log(vocabulary)
SIZE_BUDGET = 0.03  # of the recipe's parameters
VARIANTS = ("mamba2", "gated_delta_net")
LENGTHS = (16_384, 65_536, 4_096, 131_072)  # in the order of what to have where the time is not enough


def kinds(recipe: str, device: str) -> dict[str, LogLinearConfig]:
    """name -> a model of the recipe's size."""
    impl = "triton" if device == "cuda" else "torch"
    layers = get_recipe(recipe).model_config().num_hidden_layers
    changes: dict[str, dict[str, Any]] = {}
    for variant in VARIANTS:
        changes[f"log-linear {variant}"] = dict(variant=variant, impl=impl)
        changes[f"linear {variant}"] = dict(variant=variant, impl=impl, num_levels=1)
    changes["Transformer"] = {"layer_types": ["full_attention"] * layers}
    return {name: sized(recipe, change) for name, change in changes.items()}


def sized(recipe: str, changes: dict[str, Any]) -> LogLinearConfig:
    """The recipe's model with these changes, and other MLPs where it would have more or fewer parameters."""
    original = get_recipe(recipe).model_config()
    # the published lambda, which weights that are not trained differ by: losses would not see what levels are read
    options = {**get_recipe(recipe).model, "lambda_form": "softplus", **changes}
    wanted = parameter_counts(original).total
    config = LogLinearConfig(**options)
    missing = wanted - parameter_counts(config).total
    if abs(missing) > SIZE_BUDGET * wanted:
        columns = round(missing / (3 * 32 * original.hidden_size * original.num_hidden_layers)) * 32
        assert config.intermediate_size is not None
        config = LogLinearConfig(**{**options, "intermediate_size": config.intermediate_size + columns})
    assert abs(parameter_counts(config).total - wanted) <= SIZE_BUDGET * wanted
    return config


def build(config: LogLinearConfig, device: str) -> LogLinearForCausalLM:
    torch.manual_seed(0)
    with torch.device(device):
        return LogLinearForCausalLM(config).train()


def random_row(length: int, device: str) -> torch.Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(length)).to(device)


def loss_of(model: LogLinearForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    ends = torch.tensor([0, tokens.shape[1]], dtype=torch.int32, device=tokens.device)
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=tokens.is_cuda):
        return model(input_ids=tokens, labels=tokens, cu_seqlens=ends, use_cache=False).loss


def step_of(model: LogLinearForCausalLM, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=tokens.is_cuda)

    def step() -> torch.Tensor:
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.compiler.cudagraph_mark_step_begin()
        return loss.detach()

    return step


def time_steps(step: Callable[[], torch.Tensor], steps: int) -> dict[str, float]:
    """The first step's loss and seconds, which has the compilation, and the median of those after a second one."""
    losses, times = [], []
    for _ in range(steps + 2):
        start = time.perf_counter()
        losses.append(float(step()))  # waits for all that the step asked of the device
        times.append(time.perf_counter() - start)
    return {"loss": losses[0], "first_step_s": times[0], "step_s": statistics.median(times[2:])}


def check(recipe: str, device: str) -> None:
    """The same weights and tokens, every implementation: the same loss."""
    tokens = random_row(1000, device)
    for variant in VARIANTS:
        losses = {}
        for impl in ("torch", "triton") if device == "cuda" else ("torch", "reference"):
            with torch.no_grad():
                model = build(sized(recipe, dict(variant=variant, impl=impl)), device)
                losses[impl] = float(loss_of(model, tokens))
        if max(losses.values()) - min(losses.values()) > LOSS_BUDGET:
            raise SystemExit(f"implementations of {variant} disagree, nothing was timed: {losses}")


def measure_one(config: LogLinearConfig, length: int, compiled: bool, steps: int, device: str) -> dict[str, Any]:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = build(config, device)
    if compiled:
        torch._dynamo.reset()  # graphs are for one length, as in training
        compile_blocks(model, cuda_graphs=device == "cuda")
    measured: dict[str, Any] = time_steps(step_of(model, random_row(length, device)), steps)
    measured["tokens_per_second"] = length / measured["step_s"]
    if device == "cuda":
        measured["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return measured


def tried(config: LogLinearConfig, length: int, compiled: bool, steps: int, device: str) -> dict[str, Any]:
    """`measure_one`, or why it failed."""
    try:
        return measure_one(config, length, compiled, steps, device)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except Exception as error:  # of the compiler, for one: the other kinds go on
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def measure(
    recipe: str,
    lengths: list[int],
    steps: int,
    minutes: float,
    device: str,
    progress: Progress,
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """One row for each length, kind and mode; `keep` is called after every one."""
    end = time.perf_counter() + 60 * minutes
    check(recipe, device)
    rows: list[dict[str, Any]] = []
    models = kinds(recipe, device)
    task = progress.add_task("", total=2 * len(lengths) * len(models))
    for length in lengths:
        for name, config in models.items():
            losses: dict[bool, float] = {}
            for compiled in (False, True):
                progress.update(task, description=f"T {length}, {name}{', compiled' * compiled}", advance=1)
                row: dict[str, Any] = {"kind": name, "compiled": compiled, "T": length}
                row["parameters"] = parameter_counts(config).total
                in_time = time.perf_counter() < end
                row |= tried(config, length, compiled, steps, device) if in_time else {"failed": "out of time"}
                if "loss" in row:
                    losses[compiled] = row["loss"]
                if len(losses) == 2 and abs(losses[True] - losses[False]) > LOSS_BUDGET:
                    row["failed"] = "another loss than in eager mode"
                progress.console.print(row)
                rows.append(row)
                keep(rows)
                gc.collect()  # models in reference cycles, and what an exception kept alive
                if device == "cuda":
                    torch.cuda.empty_cache()
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="tokens/s (GiB at the peak)")
    lengths = sorted({row["T"] for row in rows})
    for column in ["", "parameters", *(f"T {length:,}" for length in lengths)]:
        table.add_column(column)
    for kind, compiled in dict.fromkeys((row["kind"], row["compiled"]) for row in rows):
        mine = {row["T"]: row for row in rows if (row["kind"], row["compiled"]) == (kind, compiled)}
        cells = [cell(mine[length]) if length in mine else "" for length in lengths]
        parameters = next(iter(mine.values()))["parameters"]
        table.add_row(kind + ", compiled" * compiled, f"{parameters:,}", *cells)
    console.print(table)


def cell(row: dict[str, Any]) -> str:
    if "failed" in row:
        return row["failed"].splitlines()[0][:40]
    memory = f" ({row['peak_gib']:.1f})" if "peak_gib" in row else ""
    return f"{row['tokens_per_second']:,.0f}{memory}"


def main(
    recipe: Annotated[str, typer.Option(help="whose model is built")] = "small",
    lengths: Annotated[list[int] | None, typer.Option(help="tokens of one row")] = None,
    steps: Annotated[int, typer.Option(help="timed steps; the median counts")] = 5,
    minutes: Annotated[float, typer.Option(help="after which no other kind begins")] = 8.0,
    out: Annotated[Path | None, typer.Option(help="write the numbers to this JSON file")] = None,
) -> None:
    """Time training steps in eager mode and compiled: log-linear, linear and softmax models of one size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_options(device, out, steps=steps, lengths=lengths)
    if not minutes > 0:
        raise typer.BadParameter(f"--minutes must be positive, got {minutes}")
    if recipe not in RECIPES:
        raise typer.BadParameter(f"--recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        described = about("training", device)
        chosen = lengths or list(LENGTHS)
        rows = measure(recipe, chosen, steps, minutes, device, progress, lambda rows: keep(out, described, rows))
    show(rows, Console(width=None if sys.stdout.isatty() else 200))


if __name__ == "__main__":
    command_line(main, "training")

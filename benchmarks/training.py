"""Training speed of several kinds of model of one size, in one run on one machine.

Every kind runs in eager mode and compiled, as `loglinear train --compile` does: on a GPU as CUDA graphs.

    python -m benchmarks.training --out results/training.json

Every kind has the hidden size, layers and heads of a recipe. The width of the MLPs brings its number of parameters
within 3 % of the recipe's. A step is forward, backward and AdamW under bf16 autocast (float32 on a CPU) on random
tokens, one packed row with one sequence. Losses are compared first: the same weights must give the same loss with every
implementation, and compiled as in eager mode. A kind that fails, or that the time does not allow, says so in its row,
and the others continue.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress, TaskID
from torch import nn

from benchmarks.machine import about, announce, check_options, command_line, keep, progress_bar
from loglinear.cli.console import print_table
from loglinear.models import LogLinearConfig, LogLinearForCausalLM, parameter_counts
from loglinear.recipes import get_recipe
from loglinear.training.compilation import compile_blocks

LOSS_BUDGET = 2e-2  # difference of two implementations under bf16 autocast, for a loss near log(vocabulary)
CHECKED = {"cuda": 1000, "cpu": 200}  # tokens of the comparison: the reference takes quadratic time on a CPU
SIZE_BUDGET = 0.03  # share of the recipe's parameters
VARIANTS = ("mamba2", "gated_delta_net")
READS: dict[str, dict[str, Any]] = {
    "log-linear": {},
    "routed, radix 4": dict(radix=4, finest_block=64, routing="gram"),
    "routed, radix 16": dict(radix=16, finest_block=64, routing="gram"),
    "linear": dict(num_levels=1),
}
LENGTHS = (16_384, 65_536, 4_096, 131_072)  # the most wanted first, in case time runs out


def kinds(recipe: str, device: str) -> dict[str, LogLinearConfig]:
    """Return name -> configuration of a model of the recipe's size."""
    impl = "triton" if device == "cuda" else "torch"
    layers = get_recipe(recipe).model_config().num_hidden_layers
    changes: dict[str, dict[str, Any]] = {}
    for variant in VARIANTS:
        for read, own in READS.items():
            changes[f"{variant}, {read}"] = dict(variant=variant, impl=impl, **own)
    changes["Transformer"] = {"layer_types": ["full_attention"] * layers}
    return {name: sized(recipe, change) for name, change in changes.items()}


def sized(recipe: str, changes: dict[str, Any]) -> LogLinearConfig:
    """Return the recipe's model with these changes, and MLPs of the width that keeps the number of parameters.

    A routed model has the columns that the longest of LENGTHS needs.
    """
    original = get_recipe(recipe).model_config()
    # with the published lambda untrained losses depend on the levels; with `unit` they would not show an error
    options = {**get_recipe(recipe).model, "lambda_form": "softplus", **changes}
    wanted = parameter_counts(original).total
    config = LogLinearConfig(**options)
    if config.routing is not None:
        options["num_levels"] = config.partition.num_columns(max(LENGTHS))
        config = LogLinearConfig(**options)
    missing = wanted - parameter_counts(config).total
    if abs(missing) > SIZE_BUDGET * wanted:
        columns = round(missing / (3 * 32 * original.hidden_size * original.num_hidden_layers)) * 32
        assert config.intermediate_size is not None
        config = LogLinearConfig(**{**options, "intermediate_size": config.intermediate_size + columns})
    assert abs(parameter_counts(config).total - wanted) <= SIZE_BUDGET * wanted
    return config


def build(config: LogLinearConfig, device: str) -> LogLinearForCausalLM:
    """Return a model with random weights in training mode."""
    torch.manual_seed(0)
    with torch.device(device):
        return LogLinearForCausalLM(config).train()


def random_row(length: int, device: str) -> torch.Tensor:
    """Return random tokens [1, length]."""
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(length)).to(device)


def packed(tokens: torch.Tensor) -> dict[str, Any]:
    """Return the batch of one packed row with one sequence, which predicts itself."""
    ends = torch.tensor([0, tokens.shape[1]], dtype=torch.int32, device=tokens.device)
    return {"input_ids": tokens, "labels": tokens, "cu_seqlens": ends}


def loss_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Return the loss of a batch, under bf16 autocast on a GPU."""
    ids = batch["input_ids"]
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=ids.is_cuda):
        loss: torch.Tensor = model(**batch, use_cache=False).loss
    return loss


def step_of(model: nn.Module, batch: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """Return a function that trains for one step and returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=batch["input_ids"].is_cuda)

    def step() -> torch.Tensor:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.compiler.cudagraph_mark_step_begin()
        return loss.detach()

    return step


def time_steps(step: Callable[[], torch.Tensor], steps: int, say: Callable[[str], None]) -> dict[str, float]:
    """Return the loss and the seconds of the first step, which compiles, and the median of the third and later ones."""
    losses, times = [], []
    for number in range(steps + 2):
        say(f"step {number + 1} of {steps + 2}")
        start = time.perf_counter()
        losses.append(float(step()))  # waits for the device
        times.append(time.perf_counter() - start)
    return {"loss": losses[0], "first_step_s": times[0], "step_s": statistics.median(times[2:])}


def check(models: Mapping[str, LogLinearConfig], device: str, say: Callable[[str], None]) -> None:
    """Exit unless every implementation gives the same loss for the same weights and tokens."""
    tokens = random_row(CHECKED[device], device)
    for name, config in models.items():
        losses = {}
        for impl in ("torch", "triton") if device == "cuda" else ("torch", "reference"):
            say(f"comparing losses: {name}, {impl}")
            config = copy.copy(config)
            config.impl = impl
            with torch.no_grad():
                losses[impl] = float(loss_of(build(config, device), packed(tokens)))
        if max(losses.values()) - min(losses.values()) > LOSS_BUDGET:
            raise SystemExit(f"implementations of {name} disagree, nothing was timed: {losses}")


def measure_one(
    config: LogLinearConfig, length: int, compiled: bool, steps: int, device: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return the loss, the times and the peak memory of one kind at one length."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = build(config, device)
    if compiled:
        torch._dynamo.reset()  # graphs hold one length, as in training
        compile_blocks(model, cuda_graphs=device == "cuda")
    measured: dict[str, Any] = time_steps(step_of(model, packed(random_row(length, device))), steps, say)
    measured["tokens_per_second"] = length / measured["step_s"]
    if device == "cuda":
        measured["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return measured


def tried(*arguments: Any) -> dict[str, Any]:
    """Return the value of `measure_one`, or the reason of its failure."""
    try:
        return measure_one(*arguments)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except Exception as error:  # for example of the compiler: the other kinds continue
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def measure(
    models: Mapping[str, LogLinearConfig],
    lengths: list[int],
    steps: int,
    minutes: float,
    device: str,
    progress: Progress,
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Return a row for each length, kind and mode. `keep` is called after every row."""
    end = time.perf_counter() + 60 * minutes
    rows: list[dict[str, Any]] = []
    task = progress.add_task("", total=2 * len(lengths) * len(models))
    check(models, device, partial(announce, progress, task))
    for length in lengths:
        for name, config in models.items():
            losses: dict[bool, float] = {}
            for compiled in (False, True):
                work = f"T {length:,}, {name}{', compiled' * compiled}"
                announce(progress, task, work)
                row: dict[str, Any] = {"kind": name, "compiled": compiled, "T": length}
                row["parameters"] = parameter_counts(config).total
                in_time = time.perf_counter() < end
                say = partial(_say_step, progress, task, work)
                row |= tried(config, length, compiled, steps, device, say) if in_time else {"failed": "out of time"}
                if "loss" in row:
                    losses[compiled] = row["loss"]
                if len(losses) == 2 and abs(losses[True] - losses[False]) > LOSS_BUDGET:
                    row["failed"] = "the loss differs from eager mode"
                progress.console.print(
                    f"{work}: {cell(row)}{' tokens/s' * ('failed' not in row)}", highlight=False, markup=False
                )
                progress.advance(task)
                rows.append(row)
                keep(rows)
                gc.collect()  # models in reference cycles, and objects that an exception keeps alive
                if device == "cuda":
                    torch.cuda.empty_cache()
    return rows


def _say_step(progress: Progress, task: TaskID, work: str, step: str) -> None:
    """Show the current step on the bar: a step on a CPU takes minutes."""
    progress.update(task, description=f"{work}, {step}")


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table of kinds and lengths."""
    lengths = sorted({row["T"] for row in rows})
    table = []
    for kind, compiled in dict.fromkeys((row["kind"], row["compiled"]) for row in rows):
        mine = {row["T"]: row for row in rows if (row["kind"], row["compiled"]) == (kind, compiled)}
        cells = [cell(mine[length]) if length in mine else "" for length in lengths]
        parameters = next(iter(mine.values()))["parameters"]
        table.append([kind + ", compiled" * compiled, f"{parameters:,}", *cells])
    columns = ["", "parameters", *(f"T {length:,}" for length in lengths)]
    print_table("Tokens a second (GiB at the peak)", columns, table)


def cell(row: dict[str, Any]) -> str:
    """Return the speed and the peak memory of a row, or the reason of its failure."""
    if "failed" in row:
        return row["failed"].splitlines()[0][:40]
    memory = f" ({row['peak_gib']:.1f})" if "peak_gib" in row else ""
    return f"{row['tokens_per_second']:,.0f}{memory}"


def chosen_kinds(recipe: str, wanted: list[str] | None, device: str) -> dict[str, LogLinearConfig]:
    """Return the kinds whose names contain one of `wanted`; all without it.

    Raises BadParameter for a text that no name contains.
    """
    models = kinds(recipe, device)
    for text in wanted or ():
        if not any(text in name for name in models):
            raise typer.BadParameter(f"--kind must be part of one of {', '.join(map(repr, models))}, got {text!r}")
    return {name: config for name, config in models.items() if not wanted or any(text in name for text in wanted)}


_lengths = typer.Option(help="Tokens of a row; repeatable.", show_default=", ".join(map(str, LENGTHS)))


def main(
    recipe: Annotated[str, typer.Option(help="Recipe of the model.")] = "small",
    lengths: Annotated[list[int] | None, _lengths] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only kinds with this in their name; repeatable.", show_default="all")
    ] = None,
    steps: Annotated[int, typer.Option(help="Timed steps, of which the median counts.")] = 5,
    minutes: Annotated[float, typer.Option(help="Minutes after which no further kind begins.")] = 8.0,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    """Time training steps of log-linear, routed, linear and softmax models of one size, in eager mode and compiled.

    On a CPU choose short lengths, such as --lengths 1024: a step of 16,384 tokens can take minutes.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_options(device, out, steps=steps, lengths=lengths)
    if not minutes > 0:
        raise typer.BadParameter(f"--minutes must be positive, got {minutes}")
    models = chosen_kinds(recipe, kind, device)  # a mistake shows before anything is measured
    with progress_bar() as progress:
        described = about("training", device)
        chosen = lengths or list(LENGTHS)
        rows = measure(models, chosen, steps, minutes, device, progress, lambda rows: keep(out, described, rows))
    show(rows)


if __name__ == "__main__":
    command_line(main, "training")

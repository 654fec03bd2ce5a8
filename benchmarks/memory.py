"""Memory by length: prefill, decoding and training of the paper's models, log-linear, linear and softmax.

    python -m benchmarks.memory --out results/memory-h100.json
    python -m experiments.figures                                   # draws them

The peak is in GiB and includes the weights. Training also has gradients, and one row with every block checkpointed, but
no optimizer. Another number is the size of one sequence's cache. Weights are random and bf16.
"""

# T tokens
from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

from benchmarks.decoding_models import MODELS, build, cache_at
from benchmarks.machine import about, announce, check_options, command_line, keep, progress_bar
from loglinear.cli.console import print_table
from loglinear.models import LogLinearForCausalLM

LENGTHS = (1024, 4096, 16_384, 65_536, 131_072)


def prefill(model: LogLinearForCausalLM, T: int) -> dict[str, Any]:
    """Read T tokens, and return the time and the size of the cache."""
    with torch.no_grad():
        tokens = torch.zeros(1, T, dtype=torch.long, device="cuda")
        start = time.perf_counter()
        cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values
        torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - start, "cache_gib": cache.nbytes / 2**30}


def decode(model: LogLinearForCausalLM, T: int) -> dict[str, Any]:
    """Decode a token at context T, and return the size of the cache."""
    with torch.no_grad():
        cache = cache_at(model, 1, T)
        model(torch.zeros(1, 1, dtype=torch.long, device="cuda"), past_key_values=cache)
        return {"cache_gib": cache.nbytes / 2**30}


def training(model: LogLinearForCausalLM, T: int) -> dict[str, Any]:
    """Compute the gradients of T tokens, and return the time."""
    tokens = torch.zeros(1, T, dtype=torch.long, device="cuda")
    model.train()
    model.gradient_checkpointing_enable()
    start = time.perf_counter()
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    model.gradient_checkpointing_disable()
    model.eval()
    return {"seconds": seconds}


WORK: dict[str, Callable[[LogLinearForCausalLM, int], dict[str, Any]]] = {
    "prefill": prefill,
    "decode": decode,
    "training": training,
}


def measure(progress: Progress, keep: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Return a row for each model, work and length. `keep` is called after every row."""
    rows: list[dict[str, Any]] = []
    task = progress.add_task("", total=len(MODELS) * len(WORK) * len(LENGTHS))
    for name in MODELS:
        model = build(name, "cuda", torch.bfloat16)
        for work, run in WORK.items():
            for T in LENGTHS:
                announce(progress, task, f"{name}, {work}, T {T:,}")
                row: dict[str, Any] = {"model": name, "work": work, "T": T}
                model.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                try:
                    run(model, min(T, 4096))  # makes kernels and tables once
                    model.zero_grad(set_to_none=True)
                    torch.cuda.reset_peak_memory_stats()
                    row |= run(model, T)
                    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                except torch.cuda.OutOfMemoryError:
                    row["failed"] = "out of memory"
                rows.append(row)
                keep(rows)
                progress.advance(task)
        del model
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table for each kind of work."""
    lengths = list(dict.fromkeys(row["T"] for row in rows))
    for work in dict.fromkeys(row["work"] for row in rows):
        cells = []
        for name in dict.fromkeys(row["model"] for row in rows):
            mine = {row["T"]: row for row in rows if (row["model"], row["work"]) == (name, work)}
            cells.append([name, *(mine[T].get("failed") or f"{mine[T]['peak_gib']:.2f}" for T in mine)])
        print_table(f"{work}: GiB at the peak", ["", *(f"T {T:,}" for T in lengths)], cells)


def main(out: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None) -> None:
    """Measure memory by length on a GPU."""
    check_options("cuda", out)
    described = about("memory", "cuda")
    with progress_bar() as progress:
        rows = measure(progress, lambda rows: keep(out, described, rows))
    show(rows)


if __name__ == "__main__":
    command_line(main, "memory")

"""Time and memory of the operators beside their peers, in one run on one machine.

    python -m benchmarks.ops                              # this machine's CPU; docs/benchmarks/operators.md
    python -m benchmarks.ops --lengths 4096 --out ops.json
    python -m benchmarks.ops --lengths 4096 --neighbours 2       # beside two processes that compute and allocate
    PYTHONPATH=.peers/fla:.peers/mamba:. python -m benchmarks.ops --device cuda      # see ops_gpu.py

Correctness comes first: every configuration is compared with the float64 result before it is timed. Times are medians
over rounds in which all candidates of a length run in turn, so that a slow moment meets all of them. Beside them
stands the processor time of all threads, which waiting for a processor does not change. Peak memory
is the growth of the resident set in a fresh process, inputs included.
"""

# B batch, T time, H heads, K key, V value, L levels
from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks import ops_gpu
from benchmarks.machine import about, check_options, command_line, keep
from loglinear.fenwick import num_levels
from loglinear.ops import LogLinearOutput, log_linear_attention, log_linear_delta_rule

HEADS, KEY, VALUE = 8, 64, 64
LENGTHS = [2048, 4096, 8192, 16384, 32768]
PEER_LIMIT = 8192  # transformers' Mamba-2 core and softmax attention take minutes beyond
FLOAT32_BUDGET = 1e-6
OPERATORS: dict[str, Callable[..., LogLinearOutput]] = {
    "scalar_gate": log_linear_attention,
    "delta_rule": log_linear_delta_rule,
}


def make_inputs(family: str, T: int, levels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v, log_decay, (beta,) level_scales; B 1, one group per head, unit keys."""
    generator = torch.Generator().manual_seed(T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, T, *shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(1, T, *shape, generator=generator)

    q, k, v = normal(HEADS, KEY) / KEY**0.5, F.normalize(normal(HEADS, KEY), dim=-1), normal(HEADS, VALUE)
    beta = [uniform(HEADS)] if family == "delta_rule" else []
    return [x.to(dtype) for x in (q, k, v, -0.1 * uniform(HEADS), *beta, F.softplus(normal(HEADS, levels)))]


def forward(family: str, inputs: list[Tensor]) -> Callable[[], Any]:
    return lambda: OPERATORS[family](*inputs).output


def forward_backward(family: str, inputs: list[Tensor]) -> Callable[[], Any]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    weight = torch.ones_like(inputs[2])
    return lambda: torch.autograd.grad(OPERATORS[family](*leaves).output, leaves, weight)


def peers(family: str, T: int) -> dict[str, Callable[[], Any]]:
    """What others do for the same shape: linear models in pure PyTorch, and softmax attention."""
    q, k, v, log_decay, *beta, _ = make_inputs(family, T, 1)
    if family == "delta_rule":
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

        return {"transformers Qwen3-Next": lambda: torch_chunk_gated_delta_rule(q, k, v, log_decay, beta[0])}
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    q_heads, k_heads, v_heads = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    ones = torch.ones(HEADS)
    return {
        "transformers Mamba-2": lambda: mamba2_chunk_scan(v, -log_decay, -ones, k, q, chunk_size=256),
        "softmax attention": lambda: F.scaled_dot_product_attention(q_heads, k_heads, v_heads, is_causal=True),
    }


def check(family: str, T: int, levels: int) -> float:
    """||output - float64|| / ||float64|| of the float32 forward."""
    single, double = (
        forward(family, make_inputs(family, T, levels, dtype))() for dtype in (torch.float32, torch.float64)
    )
    error = float((single - double).norm() / double.norm())
    if not error < FLOAT32_BUDGET:
        raise SystemExit(f"{family} at T {T}, L {levels} is wrong: relative error {error:.1e}; nothing was timed")
    return error


NEIGHBOUR = """
import torch
torch.set_num_threads(1)
while True:
    sum(torch.randn(1 << 20) * factor for factor in range(8))
"""


@contextmanager
def busy_neighbours(count: int) -> Iterator[None]:
    """Beside `count` processes, each of which computes on one thread and takes fresh memory all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(count)]
    try:
        time.sleep(5 if count else 0)  # they import torch first
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def median_times(candidates: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of each candidate, by the clock and of the processor: medians over rounds, after one warm-up."""
    clock: dict[str, list[float]] = {name: [] for name in candidates}
    processor: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(rounds + 1):
        for name, run in candidates.items():
            start, start_of_process = time.perf_counter(), time.process_time()
            run()
            if round_number:
                clock[name].append((time.perf_counter() - start) * 1e3)
                processor[name].append((time.process_time() - start_of_process) * 1e3)
    by_clock, of_processor = (
        {name: statistics.median(values) for name, values in times.items()} for times in (clock, processor)
    )
    return by_clock, of_processor


def peak_memory(family: str, T: int, backward: bool) -> dict[str, float]:
    """MiB of a fresh process beyond its imports, and the ratio to the size of the inputs and the output."""
    code = f"from benchmarks.ops import memory_probe; memory_probe({family!r}, {T}, {backward})"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return json.loads(out.stdout)


def memory_probe(family: str, T: int, backward: bool) -> None:
    """Prints the peak of this (fresh, Linux) process between the inputs' creation and the end of one call."""
    run = forward_backward if backward else forward
    run(family, make_inputs(family, 256, 9))()  # code and thread pools are loaded
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_peak()
    inputs = make_inputs(family, T, num_levels(T))
    result = run(family, inputs)()
    peak = resident_peak() - before
    size = sum(x.numel() * x.element_size() for x in [*inputs, inputs[2]])
    del result
    print(json.dumps({"peak_mib": peak / 2**20, "inputs_and_output_mib": size / 2**20, "ratio": peak / size}))


def resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(lengths: list[int], rounds: int, progress: Progress) -> list[dict[str, Any]]:
    rows = []
    task = progress.add_task("operators", total=len(OPERATORS) * len(lengths))
    for family in OPERATORS:
        for T in lengths:
            progress.update(task, description=f"{family}, T {T}")
            full, one = num_levels(T), 1
            row: dict[str, Any] = {"family": family, "T": T, "levels": full, "error": check(family, T, full)}
            inputs, linear = make_inputs(family, T, full), make_inputs(family, T, one)
            candidates = {
                "forward": forward(family, inputs),
                "forward+backward": forward_backward(family, inputs),
                "forward, L = 1": forward(family, linear),
                "forward+backward, L = 1": forward_backward(family, linear),
            }
            if T <= PEER_LIMIT:
                candidates |= peers(family, T)
            row["ms"], row["processor_ms"] = median_times(candidates, rounds)
            if max(lengths) == T:
                row["memory"] = {
                    "forward": peak_memory(family, T, False),
                    "forward+backward": peak_memory(family, T, True),
                }
            rows.append(row)
            progress.advance(task)
    for before, row in zip(rows, rows[1:], strict=False):
        if row["family"] == before["family"] and row["T"] == 2 * before["T"]:
            row["doubling"] = row["ms"]["forward+backward"] / before["ms"]["forward+backward"]
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    for family in OPERATORS:
        mine = [row for row in rows if row["family"] == family]
        table = Table(title=f"{family}: milliseconds (peers: and their time / our forward)")
        table.add_column("", no_wrap=True)
        for row in mine:
            table.add_column(f"T {row['T']:,}", justify="right")
        for name in dict.fromkeys(name for row in mine for name in row["ms"]):
            table.add_row(name, *(cell(row["ms"], name) for row in mine))
        table.add_row("x per doubling", *(f"{row['doubling']:.2f}" if "doubling" in row else "" for row in mine))
        table.add_row("error against float64", *(f"{row['error']:.1e}" for row in mine))
        console.print(table)
        for row in mine:
            times = ", ".join(f"{name} {ms:.0f}" for name, ms in row["processor_ms"].items())
            console.print(f"{family}, T {row['T']:,}: processor milliseconds: {times}")
        for row in mine:
            for name, memory in row.get("memory", {}).items():
                console.print(
                    f"{family}, T {row['T']:,}, {name}: peak {memory['peak_mib']:.0f} MiB, "
                    f"{memory['ratio']:.2f}x the inputs and the output ({memory['inputs_and_output_mib']:.0f} MiB)"
                )


def cell(ms: dict[str, float], name: str) -> str:
    if name not in ms:
        return ""
    return f"{ms[name]:.0f}" + ("" if name.startswith("forward") else f" ({ms[name] / ms['forward']:.1f}x)")


def main(
    lengths: Annotated[list[int] | None, typer.Option(help="sequence lengths; on cuda of those of the shapes")] = None,
    rounds: Annotated[int, typer.Option(help="timed rounds; the median counts (cpu)")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads (0: torch's default)")] = 0,
    neighbours: Annotated[int, typer.Option(min=0, help="busy processes beside it (cpu)")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    shape: Annotated[list[str] | None, typer.Option(help="which of the shapes of ops_gpu.py (cuda)")] = None,
    out: Annotated[Path | None, typer.Option(help="write the numbers to this JSON file")] = None,
) -> None:
    """Time the operators beside their peers. cpu: B 1, H 8, K 64, V 64, float32, full levels."""
    check_options(device, out, rounds=rounds, lengths=lengths, threads=threads or None)
    names = [s.name for s in ops_gpu.SHAPES]
    for name in shape or ():
        if name not in names:
            raise typer.BadParameter(f"--shape must be one of {', '.join(names)}, got {name!r}")
    if threads:
        torch.set_num_threads(threads)
    console = Console(width=None if sys.stdout.isatty() else 200)
    described = about("ops", device)
    if device == "cpu":
        described["neighbours"] = neighbours
        described["shape"] = {"B": 1, "H": HEADS, "K": KEY, "V": VALUE, "dtype": "float32"}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        if device == "cuda":
            shapes = [s for s in ops_gpu.SHAPES if shape is None or s.name in shape]
            rows = ops_gpu.measure(shapes, lengths, progress, lambda rows: keep(out, described, rows))
        else:
            with busy_neighbours(neighbours):
                rows = measure(sorted(lengths or LENGTHS), rounds, progress)
    (ops_gpu.show if device == "cuda" else show)(rows, console)
    keep(out, described, rows)


if __name__ == "__main__":
    command_line(main, "ops")

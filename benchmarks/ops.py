"""Time and memory of the operators and their peers, in one run on one machine.

    python -m benchmarks.ops                              # this machine's CPU; docs/benchmarks/operators.md
    python -m benchmarks.ops --lengths 4096 --out ops.json
    python -m benchmarks.ops --lengths 4096 --neighbours 2       # with two busy processes beside it
    python -m benchmarks.ops --gate diagonal                     # a decay for each channel of the keys
    PYTHONPATH=.peers/fla:.peers/mamba:. python -m benchmarks.ops --device cuda      # see ops_gpu.py

Every configuration is compared with the float64 result before it is timed. Times are medians over rounds. In each round
all candidates of a length run in turn, so that a slow moment affects all of them. The processor time of all threads is
measured too, which does not grow while they wait for a processor. Peak memory is the growth of the resident set of a
fresh process, inputs included.
"""

# B batch, T time, H heads, K key, V value, L levels
from __future__ import annotations

import ctypes
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
from rich.progress import Progress
from torch import Tensor

from benchmarks import ops_gpu
from benchmarks.machine import about, announce, check_options, command_line, keep, progress_bar
from loglinear.cli.console import print_table
from loglinear.fenwick import num_levels
from loglinear.ops import LogLinearOutput, log_linear_attention, log_linear_delta_rule

HEADS, KEY, VALUE = 8, 64, 64
LENGTHS = [2048, 4096, 8192, 16384, 32768]
PEER_LIMIT = 8192  # beyond it transformers' Mamba-2 core and softmax attention take minutes
FLOAT32_BUDGET = 1e-6
OPERATORS: dict[str, Callable[..., LogLinearOutput]] = {
    "scalar_gate": log_linear_attention,
    "delta_rule": log_linear_delta_rule,
    "diagonal_gate": log_linear_attention,
    "diagonal_delta_rule": log_linear_delta_rule,
}
GATES = {"scalar": ["scalar_gate", "delta_rule"], "diagonal": ["diagonal_gate", "diagonal_delta_rule"]}


def make_inputs(family: str, T: int, levels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return q, k, v, log_decay, (beta,) level_scales: B 1, one group per head, unit keys."""
    generator = torch.Generator().manual_seed(T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, T, *shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(1, T, *shape, generator=generator)

    q, k, v = normal(HEADS, KEY) / KEY**0.5, F.normalize(normal(HEADS, KEY), dim=-1), normal(HEADS, VALUE)
    beta = [uniform(HEADS)] if OPERATORS[family] is log_linear_delta_rule else []
    log_decay = -0.1 * uniform(HEADS, *([KEY] if family in GATES["diagonal"] else []))
    return [x.to(dtype) for x in (q, k, v, log_decay, *beta, F.softplus(normal(HEADS, levels)))]


def forward(family: str, inputs: list[Tensor]) -> Callable[[], Any]:
    """Return a function that computes the output."""
    return lambda: OPERATORS[family](*inputs).output


def forward_backward(family: str, inputs: list[Tensor]) -> Callable[[], Any]:
    """Return a function that computes the output and every gradient."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    weight = torch.ones_like(inputs[2])
    return lambda: torch.autograd.grad(OPERATORS[family](*leaves).output, leaves, weight)


def peers(family: str, T: int) -> dict[str, Callable[[], Any]]:
    """Return peers for the same shape: linear models in pure PyTorch, and softmax attention."""
    if family in GATES["diagonal"]:
        return {}
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
    """Return ||output - float64|| / ||float64|| of the float32 forward. Exits if it is too large."""
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
    """Run `count` processes in this context, each of which computes on one thread and allocates all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(count)]
    try:
        time.sleep(5 if count else 0)  # they import torch first
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def median_times(candidates: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the milliseconds of each candidate by the clock and by processor: medians over rounds after a warm-up."""
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
    """Return the peak of a fresh process beyond its imports in MiB, and its ratio to the inputs and the output."""
    code = f"from benchmarks.ops import memory_probe; memory_probe({family!r}, {T}, {backward})"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return json.loads(out.stdout)


def memory_probe(family: str, T: int, backward: bool) -> None:
    """Print the peak of this fresh process from the creation of the inputs to the end of one call. Linux only."""
    run = forward_backward if backward else forward
    run(family, make_inputs(family, 256, 9))()  # loads code and thread pools
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # or the call would reuse the memory of the first one, and short sequences would seem to take none
    Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from here
    before = resident_peak()
    inputs = make_inputs(family, T, num_levels(T))
    result = run(family, inputs)()
    peak = resident_peak() - before
    size = sum(x.numel() * x.element_size() for x in [*inputs, inputs[2]])
    del result
    print(json.dumps({"peak_mib": peak / 2**20, "inputs_and_output_mib": size / 2**20, "ratio": peak / size}))


def resident_peak() -> int:
    """Return the peak of the resident set in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(families: list[str], lengths: list[int], rounds: int, progress: Progress) -> list[dict[str, Any]]:
    """Return a row for each operator and length."""
    rows = []
    task = progress.add_task("operators", total=len(families) * len(lengths))
    for family in families:
        for T in lengths:
            announce(progress, task, f"{family}, T {T:,}")
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


def show(rows: list[dict[str, Any]]) -> None:
    """Print the times, the processor times and the peak memory of each operator."""
    for family in dict.fromkeys(row["family"] for row in rows):
        mine = [row for row in rows if row["family"] == family]
        columns = ["", *(f"T {row['T']:,}" for row in mine)]
        names = list(dict.fromkeys(name for row in mine for name in row["ms"]))
        times = [[name, *(cell(row["ms"], name) for row in mine)] for name in names]
        times.append(["x per doubling", *(f"{row['doubling']:.2f}" if "doubling" in row else "" for row in mine)])
        times.append(["error against float64", *(f"{row['error']:.1e}" for row in mine)])
        print_table(f"{family}: milliseconds (peers: ratio to our forward)", columns, times)
        processor = [[name, *(f"{row['processor_ms'].get(name, 0):.0f}" for row in mine)] for name in names]
        print_table(f"{family}: milliseconds of the processor, all threads", columns, processor)
        memory = [
            [f"{name}, T {row['T']:,}", *(f"{of[part]:.1f}" for part in ("peak_mib", "inputs_and_output_mib", "ratio"))]
            for row in mine
            for name, of in row.get("memory", {}).items()
        ]
        print_table(f"{family}: memory", ["", "peak MiB", "inputs and output MiB", "ratio"], memory)


def cell(ms: dict[str, float], name: str) -> str:
    """Return a time, for a peer with its ratio to our forward."""
    if name not in ms:
        return ""
    return f"{ms[name]:.0f}" + ("" if name.startswith("forward") else f" ({ms[name] / ms['forward']:.1f}x)")


def main(
    lengths: Annotated[
        list[int] | None, typer.Option(help="Sequence length, on cuda one of a shape's; repeatable.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds on a CPU, of which the median counts.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 means torch's default.")] = 0,
    neighbours: Annotated[int, typer.Option(min=0, help="Busy processes beside it on a CPU.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    gate: Annotated[str, typer.Option(help="scalar, or diagonal: a decay for each channel of the keys.")] = "scalar",
    shape: Annotated[list[str] | None, typer.Option(help="Shape of ops_gpu.py for cuda; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    """Time the operators and their peers.

    cpu: B 1, H 8, K 64, V 64, float32, all levels. cuda: the shapes of ops_gpu.py in bf16.
    """
    check_options(device, out, rounds=rounds, lengths=lengths, threads=threads or None)
    if gate not in GATES:
        raise typer.BadParameter(f"--gate must be one of {', '.join(GATES)}, got {gate!r}")
    shapes = [s for s in ops_gpu.SHAPES if s.diagonal == (gate == "diagonal")]
    names = [s.name for s in shapes]
    for name in shape or ():
        if name not in names:
            raise typer.BadParameter(f"--shape must be one of {', '.join(names)}, got {name!r}")
    if threads:
        torch.set_num_threads(threads)
    described = about("ops", device)
    if device == "cpu":
        described["neighbours"] = neighbours
        described["shape"] = {"B": 1, "H": HEADS, "K": KEY, "V": VALUE, "dtype": "float32"}
    with progress_bar() as progress:
        if device == "cuda":
            shapes = [s for s in shapes if shape is None or s.name in shape]
            rows = ops_gpu.measure(shapes, lengths, progress, lambda rows: keep(out, described, rows))
        else:
            with busy_neighbours(neighbours):
                rows = measure(GATES[gate], sorted(lengths or LENGTHS), rounds, progress)
    (ops_gpu.show if device == "cuda" else show)(rows)
    keep(out, described, rows)


if __name__ == "__main__":
    command_line(main, "ops")

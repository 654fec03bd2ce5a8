"""Training speed of one sequence on all devices of a group, compared with one device alone (weak scaling).

    torchrun --nproc-per-node 2 -m benchmarks.slices --tokens 131072 --out results/slices.json

A sequence of R T tokens is cut over R devices, T tokens on each, and DistributedDataParallel averages the gradients.
Alone, every device trains the same model on T tokens of its own at the same time, without any communication. The
efficiency is the time alone over the time on slices. Each time is that of the slowest rank. A step is that of
`benchmarks.training`. Losses are compared first: slices must give the loss of one device.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from benchmarks.machine import about, check_options, command_line, keep
from benchmarks.training import CHECKED, LOSS_BUDGET, build, chosen_kinds, loss_of, random_row, step_of, time_steps
from loglinear import parallel
from loglinear.cli.console import print_table
from loglinear.models import LogLinearConfig, parameter_counts
from loglinear.training.compilation import compile_blocks

STEPS = 5  # timed steps, of which the median counts
ONE_PROCESS = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="0")


def start(device: str) -> DeviceMesh:
    """Join the processes of torchrun, or be one process; return their mesh."""
    for name, value in ONE_PROCESS.items():
        os.environ.setdefault(name, value)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("cp",))


def largest(value: float, device: str) -> float:
    """Return the largest value of all ranks."""
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return float(shared)


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Collect the bytes that this rank sends to each other rank in each all-gather."""
    sent, all_gather = [], dist.all_gather

    def counting(gathered: list[Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(x.nbytes)
        return all_gather(gathered, x, *args, **kwargs)

    setattr(dist, "all_gather", counting)  # noqa: B010  # mypy compares the signatures of an assignment
    try:
        yield sent
    finally:
        dist.all_gather = all_gather


def check(config: LogLinearConfig, mesh: DeviceMesh, device: str) -> None:
    """Exit unless slices give the loss of one device."""
    tokens = random_row(CHECKED[device], device)
    model = build(config, device)
    with torch.no_grad():
        whole = float(loss_of(model, {"input_ids": tokens, "labels": tokens}))
        sliced = float(loss_of(model, parallel.shard(config, mesh["cp"], tokens, tokens)))
    if abs(whole - sliced) > LOSS_BUDGET:
        raise SystemExit(f"slices have the loss {sliced}, and one device has {whole}: nothing was timed")


def timed(config: LogLinearConfig, mesh: DeviceMesh, tokens: int, compiled: bool, on_slices: bool) -> dict[str, float]:
    """Return the loss, the times and the peak memory of steps on slices, or alone: those of the slowest rank."""
    device = mesh.device_type
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model: nn.Module = build(config, device)
    row = random_row(tokens * (mesh.size() if on_slices else 1), device)
    batch: dict[str, Any] = {"input_ids": row, "labels": row}
    if on_slices:
        batch = parallel.shard(config, mesh["cp"], row, row)
    if compiled:
        torch._dynamo.reset()
        compile_blocks(model)  # type: ignore[arg-type]
    if on_slices:
        model = DistributedDataParallel(model, process_group=mesh["cp"].get_group())
    dist.barrier()
    with counted_bytes() as sent:
        measured = time_steps(step_of(model, batch), STEPS, lambda text: None)
    measured["sent_bytes_per_layer"] = sum(sent) / (STEPS + 2) / config.num_hidden_layers
    if device == "cuda":
        measured["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    del model, batch
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return {name: largest(value, device) for name, value in measured.items()}


def measure_one(config: LogLinearConfig, mesh: DeviceMesh, tokens: int, compiled: bool) -> dict[str, Any]:
    """Return the row of one kind."""
    check(config, mesh, mesh.device_type)
    alone = timed(config, mesh, tokens, compiled, on_slices=False)
    sliced = timed(config, mesh, tokens, compiled, on_slices=True)
    return {
        "ranks": mesh.size(),
        "tokens_per_rank": tokens,
        "compiled": compiled,
        "parameters": parameter_counts(config).total,
        "alone": alone,
        "slices": sliced,
        "tokens_per_second": tokens * mesh.size() / sliced["step_s"],
        "efficiency": alone["step_s"] / sliced["step_s"],
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table of the kinds."""
    table = []
    for row in rows:
        memory = f"{row['slices']['peak_gib']:.1f}" if "peak_gib" in row["slices"] else ""
        times = (f"{row[how]['step_s']:.3f}" for how in ("alone", "slices"))
        speed, sent = f"{row['tokens_per_second']:,.0f}", f"{row['slices']['sent_bytes_per_layer']:,.0f}"
        table.append([row["kind"], *times, f"{row['efficiency']:.2f}", speed, memory, sent])
    columns = ["", "alone, s", "slices, s", "efficiency", "tokens/s", "GiB", "bytes per layer"]
    print_table("Training steps on slices", columns, table)


def main(
    recipe: Annotated[str, typer.Option(help="Recipe of the model.")] = "small",
    tokens: Annotated[int, typer.Option(help="Tokens of the sequence on each device.")] = 131_072,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only kinds with this in their name; repeatable.", show_default="all")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile every block.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    """Time training steps of one sequence that is cut over all devices, compared with one device alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_options(device, out, tokens=tokens)
    models = {name: config for name, config in chosen_kinds(recipe, kind, device).items() if name != "Transformer"}
    mesh, described = start(device), about("slices", device)
    rows: list[dict[str, Any]] = []
    for name, config in models.items():
        rows.append({"kind": name, **measure_one(config, mesh, tokens, compiled)})
        if dist.get_rank() == 0:
            show(rows[-1:])
            keep(out, described, rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    command_line(main, "slices")

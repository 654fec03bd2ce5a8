"""Measures which plan is fastest for a shape on this GPU: what `loglinear tune` runs.

Every candidate launch runs once in all stages, the profiler says what each stage took, and each takes its best; the
chunk size is the one with the smallest sum. A plan is compared with float64 before anybody gets it.
"""

# B batch, T time, G groups, H heads, K key, V value, L levels
from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from triton.runtime.errors import OutOfResources

from loglinear.fenwick import num_levels
from loglinear.kernels.triton.config import STAGES, Launch, Plan, table_key
from loglinear.kernels.triton.inputs import Operands, Outgoing, Sequences
from loglinear.kernels.triton.scalar_gate import forward, gradients, inputs_of
from loglinear.partition import FENWICK

WARPS_AND_STAGES = ((4, 2), (4, 3), (8, 2), (8, 3))
SWEEPS = (Launch(128, 4, 2), Launch(128, 4, 3), Launch(64, 4, 3), Launch(64, 4, 4))
LIMITS = {torch.bfloat16: 4e-3, torch.float16: 2e-3, torch.float32: 1e-4}


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    G: int
    H: int
    K: int
    V: int
    dtype: torch.dtype

    def inputs(self, B: int | None = None, T: int | None = None, H: int | None = None) -> list[Tensor]:
        B, T, H = B or self.B, T or self.T, H or self.H
        G = min(self.G, H)
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(B, T, *shape, generator=generator, device="cuda", dtype=self.dtype)

        log_decay = -0.1 * torch.rand(B, T, H, generator=generator, device="cuda")
        q, k = normal(G, self.K) / self.K**0.5, F.normalize(normal(G, self.K), dim=-1)
        return [q, k, normal(H, self.V), log_decay, F.softplus(normal(H, num_levels(T)))]


def candidates(direction: str, shape: Shape) -> Iterator[Plan]:
    chunk_sizes = (64, 128) if shape.dtype == torch.bfloat16 and max(shape.K, shape.V) <= 128 else (32, 64)
    tiles = [tile for tile in (32, 64, 128) if tile <= max(32, shape.V) and (tile != 32 or shape.dtype.itemsize == 4)]
    for chunk_size in chunk_sizes:
        for tile in tiles:
            for number, (warps, stages) in enumerate(WARPS_AND_STAGES):
                launches = dict.fromkeys(STAGES[direction], Launch(tile, warps, stages))
                launches |= {name: SWEEPS[number] for name in launches if name.endswith("sweep")}
                yield Plan(chunk_size, launches)


def run(direction: str, inputs: list[Tensor], plan: Plan, do: Tensor | None = None) -> list[Tensor]:
    """The output, or the five gradients."""
    q, k, v, log_decay, level_scales = inputs
    operands, dense = Operands(q, k, v, log_decay, None, level_scales, None), Sequences(None, None)
    if direction == "backward":
        do = torch.ones_like(v) if do is None else do
        grads = gradients(operands, dense, Outgoing(do, None), 1.0, plan)
        return [grad for grad in grads if grad is not None]
    return [forward(inputs_of(operands, dense, 1.0, plan), plan, final=False).output]


def _compile(direction: str, shape: Shape, plan: Plan) -> None:
    with contextlib.suppress(OutOfResources):
        run(direction, shape.inputs(B=1, T=4096, H=shape.H // shape.G * min(shape.G, 2)), plan)


def stage_times(direction: str, inputs: list[Tensor], plan: Plan, runs: int = 5) -> dict[str, float]:
    """Milliseconds of every stage; the kernels' names are the stages'."""
    run(direction, inputs, plan)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(runs):
            run(direction, inputs, plan)
        torch.cuda.synchronize()
    times = {}
    for event in profiled.key_averages():
        stage = event.key.removesuffix("_kernel")
        if stage in STAGES[direction]:
            times[stage] = event.self_device_time_total / 1e3 / runs
    return times


def compile_candidates(direction: str, shape: Shape) -> None:
    """Fills the compiler's cache, one process for each candidate: kernels do not depend on B, T and H."""
    plans = list(candidates(direction, shape))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(plans), os.cpu_count() or 1), mp_context=context) as pool:
        for future in [pool.submit(_compile, direction, shape, plan) for plan in plans]:
            future.result()


def tune(direction: str, shape: Shape) -> tuple[Plan, float]:
    """The fastest plan and the sum of its stages in milliseconds."""
    plans = list(candidates(direction, shape))
    inputs = shape.inputs()
    best: dict[int, dict[str, tuple[float, Launch]]] = {}
    for plan in plans:
        try:
            times = stage_times(direction, inputs, plan)
        except OutOfResources:
            continue
        stages = best.setdefault(plan.chunk_size, {})
        for stage, ms in times.items():
            stages[stage] = min(
                stages.get(stage, (ms, plan.stages[stage])), (ms, plan.stages[stage]), key=lambda x: x[0]
            )
    sums = {chunk_size: sum(ms for ms, _ in stages.values()) for chunk_size, stages in best.items()}
    chunk_size = min(sums, key=lambda size: sums[size])
    plan = Plan(chunk_size, {stage: launch for stage, (_, launch) in best[chunk_size].items()})
    check(direction, shape, plan)
    return plan, sums[chunk_size]


def check(direction: str, shape: Shape, plan: Plan) -> None:
    """Compares the output, or every gradient, with float64 on a few heads; raises RuntimeError if one is wrong."""
    from loglinear.kernels.torch import fenwick_array

    inputs = shape.inputs(B=1, T=4096, H=shape.H // shape.G * min(shape.G, 2))
    do = torch.randn_like(inputs[2])
    actual = run(direction, inputs, plan, do)
    leaves = [x[0].double().requires_grad_() for x in inputs]
    q, k, v, log_decay, level_scales = leaves
    exact, _ = fenwick_array(q, k, v, log_decay, None, level_scales, None, None, None, 1, 64, False, FENWICK.numbers)
    expected = [exact] if direction == "forward" else list(torch.autograd.grad(exact, leaves, do[0].double()))
    for name, a, e in zip(["q", "k", "v", "log_decay", "level_scales"], actual, expected, strict=False):
        limit = LIMITS[shape.dtype] * (2 if direction == "backward" and name == "log_decay" else 1)
        error = float((a[0].double() - e).norm() / e.norm())
        if not error <= limit:
            what = "output" if direction == "forward" else f"gradient of {name}"
            raise RuntimeError(f"{shape} {plan} is wrong on this GPU: relative error {error:.1e} of the {what}")


def write(path: Path, direction: str, shape: Shape, plan: Plan) -> None:
    """Adds the plan to the table of this GPU, atomically."""
    table = json.loads(path.read_text()) if path.exists() else {}
    key = table_key(direction, shape.K, shape.V, shape.dtype, shape.T)
    table.setdefault(torch.cuda.get_device_name(), {})[key] = plan.to_json()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)

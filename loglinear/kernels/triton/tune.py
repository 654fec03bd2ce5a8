"""The measurements of `loglinear tune`: the fastest plan for a shape on this GPU.

Every candidate launch runs once in all stages, the profiler gives the time of each stage, and each takes its best; the
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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from triton.runtime.errors import OutOfResources

from loglinear.fenwick import num_levels
from loglinear.kernels.triton import delta_rule, scalar_gate
from loglinear.kernels.triton.inputs import Operands, Outgoing, Sequences
from loglinear.kernels.triton.launches import Kind, Launch, Plan, default_plan, table_key
from loglinear.partition import FENWICK
from loglinear.processes import follow_parent

FAMILIES = {"scalar_gate": scalar_gate, "delta_rule": delta_rule}
DENSE = Sequences(None, None)
WARPS_AND_STAGES = ((4, 2), (4, 3), (8, 2), (8, 3))
SWEEPS = [Launch(tile, num_stages=stages) for tile, stages in ((128, 2), (128, 3), (64, 3), (64, 4))]
# The delta rule keeps the warps of its defaults: with others Triton 3.6 compiles some of its kernels wrongly.
DELTA_RULE_TILES, DELTA_RULE_STAGES = (64, 128), (1, 2, 3)
LIMITS = {torch.bfloat16: 4e-3, torch.float16: 2e-3, torch.float32: 1e-4}
DELTA_RULE_LIMIT = 4  # times as large: the error of a chunk's inverse is carried on


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    G: int
    H: int
    K: int
    V: int
    dtype: torch.dtype
    operator: str = "scalar_gate"

    def kind(self, direction: str) -> Kind:
        dtype = self.dtype
        if self.operator == "delta_rule":
            one = torch.empty(1, 1, 1, 1, dtype=dtype)
            q, v = one.expand(1, 1, 1, self.K), one.expand(1, 1, 1, self.V)
            dtype = delta_rule.products_of(q, q, v)
        return Kind(self.operator, direction, self.K, self.V, dtype)

    def operands(self, B: int | None = None, T: int | None = None, H: int | None = None) -> Operands:
        B, T, H = B or self.B, T or self.T, H or self.H
        G = min(self.G, H)
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(B, T, *shape, generator=generator, device="cuda", dtype=self.dtype)

        def uniform() -> Tensor:
            return torch.rand(B, T, H, generator=generator, device="cuda")

        log_decay, beta = -0.1 * uniform(), uniform() if self.operator == "delta_rule" else None
        q, k = normal(G, self.K) / self.K**0.5, F.normalize(normal(G, self.K), dim=-1)
        return Operands(q, k, normal(H, self.V), log_decay, beta, F.softplus(normal(H, num_levels(T))), None)

    def few_heads(self) -> Operands:
        """A short sequence of one or two groups."""
        return self.operands(B=1, T=4096, H=self.H // self.G * min(self.G, 2))


class Call(NamedTuple):
    """The operands of a measured call; for a backward also the gradient of its output and what its forward saved."""

    operands: Operands
    outgoing: Outgoing | None

    @classmethod
    def of(cls, kind: Kind, operands: Operands) -> Call:
        if kind.direction == "forward":
            return cls(operands, None)
        plan = default_plan(kind._replace(direction="forward"))
        family = FAMILIES[kind.operator]
        results = family.forward(family.inputs_of(operands, DENSE, 1.0, plan), final=False)
        return cls(operands, Outgoing(torch.ones_like(operands.v), None, results.inverse, results.cumulative))


def candidates(kind: Kind) -> Iterator[Plan]:
    yield from _scalar_gate(kind) if kind.operator == "scalar_gate" else _delta_rule(kind)


def _scalar_gate(kind: Kind) -> Iterator[Plan]:
    chunk_sizes = (64, 128) if kind.dtype == torch.bfloat16 and max(kind.K, kind.V) <= 128 else (32, 64)
    tiles = [tile for tile in (32, 64, 128) if tile <= max(32, kind.V) and (tile != 32 or kind.dtype.itemsize == 4)]
    for chunk_size in chunk_sizes:
        for tile in tiles:
            for number, (warps, stages) in enumerate(WARPS_AND_STAGES):
                if warps == 8 and kind.dtype != torch.bfloat16:
                    continue  # Triton 3.6 miscompiles some of these (docs/lab-notes/2026-11-30-diagonal-kernels.md)
                launches = dict.fromkeys(kind.stages, Launch(tile, num_warps=warps, num_stages=stages))
                launches |= {name: SWEEPS[number] for name in launches if name.endswith("sweep")}
                yield Plan(chunk_size, launches)


def _delta_rule(kind: Kind) -> Iterator[Plan]:
    default = default_plan(kind)
    yield default
    for tile in DELTA_RULE_TILES:
        for stages in DELTA_RULE_STAGES:
            launches = {name: x._replace(value_tile=tile, num_stages=stages) for name, x in default.stages.items()}
            yield Plan(default.chunk_size, launches)


def run(kind: Kind, call: Call, plan: Plan) -> list[Tensor]:
    """The output, or the gradient of every operand."""
    family = FAMILIES[kind.operator]
    if call.outgoing is None:
        return [family.forward(family.inputs_of(call.operands, DENSE, 1.0, plan), final=False).output]
    grads = family.gradients(call.operands, DENSE, call.outgoing, 1.0, plan)
    return [grad for grad in grads if grad is not None]


def _compile(kind: Kind, shape: Shape, plan: Plan) -> None:
    with contextlib.suppress(OutOfResources):
        run(kind, Call.of(kind, shape.few_heads()), plan)


def stage_times(kind: Kind, call: Call, plan: Plan, runs: int = 5) -> dict[str, float]:
    """Milliseconds of every stage; the kernels' names are the stages'."""
    run(kind, call, plan)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(runs):
            run(kind, call, plan)
        torch.cuda.synchronize()
    times = {}
    for event in profiled.key_averages():
        stage = event.key.removesuffix("_kernel")
        if stage in kind.stages:
            times[stage] = event.self_device_time_total / 1e3 / runs
    return times


def compile_candidates(direction: str, shape: Shape) -> None:
    """Fills the compiler's cache, one process for each candidate: kernels do not depend on B, T and H."""
    kind = shape.kind(direction)
    plans = list(candidates(kind))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(plans), os.cpu_count() or 1), context, follow_parent) as pool:
        for future in [pool.submit(_compile, kind, shape, plan) for plan in plans]:
            future.result()


def tune(direction: str, shape: Shape) -> tuple[Plan, float]:
    """The fastest plan and the sum of its stages in milliseconds."""
    kind = shape.kind(direction)
    call = Call.of(kind, shape.operands())
    best: dict[int, dict[str, tuple[float, Launch]]] = {}
    for plan in candidates(kind):
        try:
            times = stage_times(kind, call, plan)
        except OutOfResources:
            continue
        stages = best.setdefault(plan.chunk_size, {})
        for stage, ms in times.items():
            stages[stage] = min(stages.get(stage, (ms, plan[stage])), (ms, plan[stage]), key=lambda x: x[0])
    sums = {chunk_size: sum(ms for ms, _ in stages.values()) for chunk_size, stages in best.items()}
    chunk_size = min(sums, key=lambda size: sums[size])
    launches = {stage: launch for stage, (_, launch) in best[chunk_size].items()}
    plan = Plan(chunk_size, default_plan(kind, chunk_size).stages | launches)
    check(kind, shape, plan)
    return plan, sums[chunk_size]


def check(kind: Kind, shape: Shape, plan: Plan) -> None:
    """Compares the output, or every gradient, with float64 on a few heads; raises RuntimeError if one is wrong."""
    from loglinear.kernels.torch import fenwick_array

    call = Call.of(kind, shape.few_heads())
    actual = run(kind, call, plan)
    names = [name for name, x in zip(Operands._fields, call.operands, strict=True) if x is not None]
    leaves = [x[0].double().requires_grad_() for x in call.operands if x is not None]
    by_name = dict(zip(names, leaves, strict=True))
    tensors = [by_name.get(name) for name in Operands._fields]
    exact, _ = fenwick_array(*tensors, None, None, 1, 64, False, FENWICK.numbers)
    expected = [exact] if call.outgoing is None else list(torch.autograd.grad(exact, leaves, torch.ones_like(exact)))
    for name, a, e in zip(names, actual, expected, strict=False):
        limit = LIMITS[kind.dtype] * (2 if call.outgoing is not None and name == "log_decay" else 1)
        limit *= DELTA_RULE_LIMIT if kind.operator == "delta_rule" else 1
        error = float((a[0].double() - e).norm() / e.norm())
        if not error <= limit:
            wrong = "output" if call.outgoing is None else f"gradient of {name}"
            raise RuntimeError(f"{shape} {plan} is wrong on this GPU: relative error {error:.1e} of the {wrong}")


def write(path: Path, direction: str, shape: Shape, plan: Plan) -> None:
    """Adds the plan to the table of this GPU, atomically."""
    table = json.loads(path.read_text()) if path.exists() else {}
    table.setdefault(torch.cuda.get_device_name(), {})[table_key(shape.kind(direction), shape.T)] = plan.to_json()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)

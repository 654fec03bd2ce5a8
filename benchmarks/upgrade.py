"""Prefill and decoding of pretrained linear models, original and upgraded: speed, peak memory, bytes of the cache.

    python -m benchmarks.upgrade --device cuda --out results/upgrade-h200.json
    python -m benchmarks.upgrade                                        # tiny models on a CPU: everything works

Models of published sizes have random bfloat16 weights, the same for an original and its upgrades. Prefill reads one
sequence. Decoding continues it, in one row and in 16 equal ones. It is transformers' eager mode: one forward pass for
each token, with transformers' cache. `seconds` is the wall time of a prefill or step. `device_seconds` is the time of a
GPU's kernels in a step; where it is less, the GPU waits for the CPU.

A row names the code that `ran`: transformers calls the kernels of installed packages, or torch code of its own without
them. A row that does not fit into memory or time says so, and the others continue. `logits_difference` compares the
last token of a prefill with the original's.

Most of the first minutes compile kernels. On a slow CPU, compile those of the families at once before:

    python -m benchmarks.upgrade --device cuda --family Mamba-2 --model "radix 2" --layers 4 --steps 1 &
    python -m benchmarks.upgrade --device cuda --family Qwen3.5 --model "radix 2" --layers 4 --steps 1 & wait
"""

# B batch, T time
from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import transformers
import typer
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from benchmarks.machine import about, announce, check_options, command_line, keep, progress_bar
from benchmarks.upgrade_models import FAMILIES, KINDS, Family, build, cache_bytes, new_cache, repeat_rows
from loglinear.cli.console import human_bytes, print_table
from loglinear.ops.announcement import announced
from loglinear.upgrades import new_parameters

LENGTHS = {"cuda": (2048, 16_384, 131_072), "cpu": (64, 256)}
BATCHES = (1, 16)
WARM_UP = 2  # steps
FEWEST_LAYERS = 4  # of Qwen3.5 the fourth has full attention, whose cache knows the length
PROFILED = 2  # steps whose kernels are added up


class Plan(NamedTuple):
    """The measurements of one call."""

    device: str
    families: list[str]
    kinds: list[str]
    lengths: list[int]
    steps: int
    layers: int | None
    end: float
    """The time, as time.perf_counter gives it, after which no further row begins."""


class Reader:
    """A model that reads and writes tokens with a cache of transformers."""

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.model, self.cache_name = model, family.cache_name
        self.on_gpu = model.device.type == "cuda"

    def prefill(self, T: int) -> tuple[Tensor, Cache]:
        """Return the last token's logits [vocabulary] after T tokens, and the cache."""
        tokens = torch.randint(3, 200, (1, T), generator=torch.Generator().manual_seed(1)).to(self.model.device)
        cache = new_cache(self.model)
        return self._forward(tokens, cache)[0], cache

    def decode(self, token: Tensor, cache: Cache, steps: int) -> Tensor:
        """Return the next token [B, 1] after `steps` greedy ones. The CPU does not wait for them."""
        for _ in range(steps):
            token = self._forward(token, cache).argmax(-1, keepdim=True)
        return token

    def _forward(self, tokens: Tensor, cache: Cache) -> Tensor:
        given = {self.cache_name: cache, "use_cache": True, "logits_to_keep": 1}
        return self.model(tokens, **given).logits[:, -1]

    def seconds(self, run: Callable[[], Any]) -> tuple[float, Any]:
        """Return the wall time of a call, until the device is done, and its result."""
        self._wait()
        start = time.perf_counter()
        result = run()
        self._wait()
        return time.perf_counter() - start, result

    def device_seconds(self, run: Callable[[], Any]) -> float:
        """Return the time that a GPU spends in the kernels of a call."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            self._wait()
        return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6

    def reset_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, int]:
        """Return the largest number of allocated bytes, weights included; nothing on a CPU."""
        return {"peak_bytes": torch.cuda.max_memory_allocated()} if self.on_gpu else {}

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def tried(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers of a measurement, or the reason of its failure."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:  # for example of a compiler: the other rows continue
        reason = f"{type(error).__name__}: {error}"[:300]
    gc.collect()  # tensors that the exception kept alive
    return {"failed": reason}


class Measurement:
    """The rows of one model.

    `originals` holds the logits of the family's original by length, which the original writes and its upgrades read.
    """

    def __init__(self, plan: Plan, family: str, kind: str, originals: dict[int, Tensor]) -> None:
        self.plan, self.family, self.kind, self.originals = plan, FAMILIES[family], kind, originals
        self.named = {"family": family, "model": kind}
        model = build(self.family, kind, max(plan.lengths), plan.device, plan.layers)
        self.reader = Reader(model, self.family)
        self.seconds_per_token = 0.0  # of the longest prefill so far
        new = 0 if kind == "original" else sum(p.numel() for p in new_parameters(model).values())
        weights = {id(p): p for p in model.parameters()}.values()
        self.sizes = {
            "parameters": sum(p.numel() for p in weights),
            "new_parameters": new,
            "weight_bytes": sum(p.nbytes for p in weights),
        }

    def prefill(self, T: int) -> tuple[dict[str, Any], Cache | None]:
        """Return the row of a prefill, and its cache if there is one."""
        row: dict[str, Any] = {**self.named, "work": "prefill", "B": 1, "T": T, **self.sizes}
        if time.perf_counter() + 2 * T * self.seconds_per_token > self.plan.end:
            return {**row, "failed": "out of time"}, None
        caches: list[Cache] = []

        def measure() -> dict[str, Any]:
            self.reader.reset_peak()
            with announced() as lines:
                first, _ = self.reader.seconds(lambda: self.reader.prefill(T))
            self.reader.reset_peak()
            seconds, (logits, cache) = self.reader.seconds(lambda: self.reader.prefill(T))
            self.seconds_per_token = seconds / T
            caches.append(cache)
            found = {"first_seconds": first, "seconds": seconds, "tokens_per_second": T / seconds}
            return {
                **found,
                **self.reader.peak(),
                **cache_bytes(cache),
                **self._code("prefill", lines),
                **self._compared(T, logits),
            }

        return {**row, **tried(measure)}, caches[0] if caches else None

    def decode(self, T: int, B: int, cache: Cache | None) -> dict[str, Any]:
        """Return the row of decoding with B rows after T tokens or a little more. The cache, if there is one, grows."""
        row: dict[str, Any] = {**self.named, "work": "decode", "B": B, "T": T, **self.sizes}
        if cache is None:
            return {**row, "failed": "no prefill"}
        if time.perf_counter() > self.plan.end:
            return {**row, "failed": "out of time"}

        def measure() -> dict[str, Any]:
            self.reader.reset_peak()
            repeat_rows(cache, B)
            token = torch.full((B, 1), 3, device=self.plan.device)
            with announced() as lines:
                first, token = self.reader.seconds(lambda: self.reader.decode(token, cache, WARM_UP))
            seconds, token = self.reader.seconds(lambda: self.reader.decode(token, cache, self.plan.steps))
            step = seconds / self.plan.steps
            found = {"first_seconds": first, "seconds": step, "tokens_per_second": B / step, **self.reader.peak()}
            found |= {**cache_bytes(cache), **self._code("decode", lines)}
            if self.reader.on_gpu:  # a profiler that fails must not take the other numbers with it
                profiled = tried(lambda: self._profiled(token, cache))
                found |= {name.replace("failed", "profile_failed"): value for name, value in profiled.items()}
            return found

        return {**row, **tried(measure)}

    def _profiled(self, token: Tensor, cache: Cache) -> dict[str, Any]:
        run = partial(self.reader.decode, token, cache, PROFILED)
        return {"device_seconds": self.reader.device_seconds(run) / PROFILED}

    def _code(self, work: str, lines: list[str]) -> dict[str, Any]:
        return {"ran": self.family.implementations(work) if self.kind == "original" else lines}

    def _compared(self, T: int, logits: Tensor) -> dict[str, float]:
        """Return the root mean square of the difference to the original's logits, over that of the latter."""
        if self.kind == "original":
            self.originals[T] = logits
        if self.kind == "original" or T not in self.originals:
            return {}
        original = self.originals[T].double()
        return {"logits_difference": ((logits - original).norm() / original.norm()).item()}


@torch.no_grad()
def measure(plan: Plan, progress: Progress, keep: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Return a row for each model, length and work. `keep` is called after every row."""
    rows: list[dict[str, Any]] = []
    originals: dict[str, dict[int, Tensor]] = {family: {} for family in plan.families}
    task = progress.add_task("", total=len(plan.kinds) * len(plan.families) * len(plan.lengths) * (1 + len(BATCHES)))

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        keep(rows)
        progress.advance(task)
        place = _work((row["work"], row["B"], row["T"]))
        announce(progress, task, f"{row['family']}, {row['model']}, {place}: {cell(row)}")

    for kind in plan.kinds:
        for family in plan.families:
            model = Measurement(plan, family, kind, originals[family])
            for T in plan.lengths:
                row, cache = model.prefill(T)
                add(row)
                for B in BATCHES:
                    add(model.decode(T, B, cache))
                del cache
            del model
            gc.collect()  # it is in reference cycles
    return rows


def cell(row: dict[str, Any]) -> str:
    """Return the speed and the peak memory of a row, or the reason of its failure."""
    if "failed" in row:
        return row["failed"].splitlines()[0][:40]
    peak = f" ({human_bytes(row['peak_bytes'])})" if "peak_bytes" in row else ""
    return f"{row['tokens_per_second']:,.0f}{peak}"


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table for each family: speed and peak memory, then the cache of one sequence, by kind of model."""
    for family in dict.fromkeys(row["family"] for row in rows):
        mine = {(row["work"], row["B"], row["T"], row["model"]): row for row in rows if row["family"] == family}
        kinds = list(dict.fromkeys(kind for *_, kind in mine))
        works = sorted({key[:3] for key in mine}, key=lambda place: (place[0] == "decode", *place[1:]))
        table = [[_work(place), *(cell(mine[(*place, kind)]) for kind in kinds)] for place in works]
        for place in (place for place in works if place[0] == "prefill"):
            sizes = [_cache(mine[(*place, kind)]) for kind in kinds]
            table.append([f"cache, T {place[2]:,}", *sizes])
        size = next(iter(mine.values()))["parameters"]
        title = f"{family}, {size:,} parameters: tokens a second (memory at the peak); cache: linear + full attention"
        print_table(title, ["", *kinds], table)


def _work(place: tuple[str, int, int]) -> str:
    return f"{place[0]}, B {place[1]}, T {place[2]:,}"


def _cache(row: dict[str, Any]) -> str:
    if "state_bytes" not in row:
        return "-"
    return f"{human_bytes(row['state_bytes'])} + {human_bytes(row['key_value_bytes'])}"


_lengths = typer.Option(help="Tokens of a prefill; repeatable.", show_default="2048, 16384, 131072; on a CPU 64, 256")


def main(
    device: Annotated[str, typer.Option(help="cpu, with tiny models, or cuda.")] = "cpu",
    family: Annotated[list[str] | None, typer.Option(help="A family; repeatable. All without it.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A kind of model; repeatable. All without it.")] = None,
    lengths: Annotated[list[int] | None, _lengths] = None,
    steps: Annotated[int, typer.Option(help="Timed steps of decoding.")] = 64,
    layers: Annotated[
        int | None, typer.Option(help="Layers of each model, at least 4.", show_default="as published")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Minutes after which no further row begins.")] = 4.0,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    """Measure prefill and decoding of pretrained linear models, original and upgraded."""
    check_options(device, out, lengths=lengths, steps=steps, layers=layers)
    if not minutes > 0:
        raise typer.BadParameter(f"--minutes must be positive, got {minutes}")
    if layers is not None and layers < FEWEST_LAYERS:
        raise typer.BadParameter(f"--layers must be at least {FEWEST_LAYERS}, got {layers}")
    chosen = _known("family", family, FAMILIES), _known("model", model, KINDS)
    end = time.perf_counter() + 60 * minutes
    plan = Plan(device, *chosen, lengths or list(LENGTHS[device]), steps, layers, end)
    described = about("upgrade", device)
    described["versions"]["transformers"] = transformers.__version__
    with progress_bar() as progress:
        rows = measure(plan, progress, lambda rows: keep(out, described, rows))
    show(rows)


def _known(option: str, given: list[str] | None, known: dict[str, Any]) -> list[str]:
    """Return the given names, or all; BadParameter for an unknown one."""
    for name in given or []:
        if name not in known:
            raise typer.BadParameter(f"--{option} must be one of {', '.join(map(repr, known))}, got {name!r}")
    return given or list(known)


if __name__ == "__main__":
    command_line(main, "upgrade")

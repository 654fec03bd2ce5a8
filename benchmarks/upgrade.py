"""Prefill and decoding of pretrained linear models, original and upgraded: speed, peak memory, cache, rounding.

    python -m benchmarks.upgrade --device cuda --out results/upgrade-h200.json
    python -m benchmarks.upgrade                                        # tiny models on a CPU: everything works

Models of published sizes have random bfloat16 weights, the same for an original and its upgrades. Prefill reads one
sequence. Decoding continues it, in one row and in 16 equal ones. It is transformers' eager mode: one forward pass for
each token, with transformers' cache. `seconds` is the wall time of a prefill or step. `device_seconds` is the time of a
GPU's kernels in a step; where it is less, the GPU waits for the CPU.

`logits_error` is the distance of a model's logits to those of the original in float32, at the shortest length. The
original in bfloat16 has such a row too: its own rounding. `logits_difference` is the distance to that original. Both
are norms of a difference, over the norm of the reference, of the last 64 tokens of a prefill.

All models run at a length before any runs at the next one. A row names the code that `ran`: transformers calls the
kernels of installed packages, or torch code of its own without them. A row that does not fit into memory or time says
so, and the others continue.

Most of the first minutes compile kernels. On a slow CPU, compile those of the families at once before:

    for family in Mamba-2 Qwen3.5; do
        python -m benchmarks.upgrade --device cuda --family $family --model "radix 2" --model "radix 16, routed" \\
            --layers 4 --steps 1 &
    done; wait
"""

# B batch, T time
from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator
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
from benchmarks.upgrade_models import FAMILIES, KINDS, build, cache_bytes, of_kind, repeat_rows
from benchmarks.upgrade_reader import Reader
from loglinear.cli.console import human_bytes, print_table
from loglinear.ops.announcement import announced
from loglinear.upgrades import new_parameters

LENGTHS = {"cuda": (2048, 16_384, 131_072), "cpu": (64, 256)}
BATCHES = (1, 16)
FEWEST_LAYERS = 4  # of Qwen3.5 the fourth has full attention, whose cache knows the length
ORDER = ("prefill", "decode", "float32")  # of the works in a table
WARM_UP, PROFILED = 2, 1  # steps: before the timed ones, and those whose kernels are added up
SLOW = 3.0  # seconds of a first prefill that is not repeated
EXACT_TOKENS = 2048  # more tokens are not read in float32
MEMORY_MARGIN = 1.25  # estimates are rough, and a prefill that runs out of memory takes seconds


class Plan(NamedTuple):
    """The measurements of one call."""

    device: str
    families: list[str]
    kinds: list[str]
    lengths: list[int]
    """In ascending order."""
    steps: int
    layers: int | None
    end: float
    """The time, as time.perf_counter gives it, after which no further row begins."""

    @property
    def exact_length(self) -> int | None:
        """The length at which the original also runs in float32."""
        return self.lengths[0] if self.lengths[0] <= EXACT_TOKENS else None

    def is_over(self, seconds: float = 0.0) -> bool:
        """Return True if a measurement of so many seconds would end too late."""
        return time.perf_counter() + seconds > self.end


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


def distance(logits: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference, over that of the reference."""
    wide = reference.float()
    return ((logits.float() - wide).norm() / wide.norm()).item()


class Notes:
    """The numbers of a family that later rows need.

    `exact` and `rounded` hold the original's logits by length, in float32 and in bfloat16; `prefills` holds the row of
    the longest prefill so far by kind.
    """

    def __init__(self) -> None:
        self.exact: dict[int, Tensor] = {}
        self.rounded: dict[int, Tensor] = {}
        self.prefills: dict[str, dict[str, Any]] = {}


class Measurement:
    """The rows of one model at one length."""

    def __init__(self, plan: Plan, family: str, kind: str, model: PreTrainedModel, notes: Notes, T: int) -> None:
        self.plan, self.family, self.kind, self.T, self.notes = plan, FAMILIES[family], kind, T, notes
        self.named = {"family": family, "model": kind}
        new = 0 if kind == "original" else sum(p.numel() for p in new_parameters(model).values())
        weights = {id(p): p for p in model.parameters()}.values()
        self.sizes = {
            "parameters": sum(p.numel() for p in weights),
            "new_parameters": new,
            "weight_bytes": sum(p.nbytes for p in weights),
        }
        self.reader = Reader(model, self.family.cache_name, self.sizes["weight_bytes"])

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of prefill and decoding."""
        row, cache = self.prefill()
        yield row
        for B in BATCHES:
            yield self.decode(B, cache)

    def prefill(self) -> tuple[dict[str, Any], Cache | None]:
        """Return the row of a prefill, and its cache if there is one."""
        row = self._row("prefill", 1)
        obstacle = self._obstacle()
        if obstacle is not None:
            return {**row, "failed": obstacle}, None
        caches: list[Cache] = []

        def measure() -> dict[str, Any]:
            self.reader.reset_peak()
            with announced() as lines:
                first, (logits, cache) = self.reader.seconds(lambda: self.reader.prefill(self.T))
            seconds = first
            if first <= SLOW:
                del logits, cache  # memory of the first prefill is none of the second's
                self.reader.reset_peak()
                seconds, (logits, cache) = self.reader.seconds(lambda: self.reader.prefill(self.T))
            caches.append(cache)
            found = {"first_seconds": first, "seconds": seconds, "tokens_per_second": self.T / seconds}
            found |= {**self.reader.peak(), **cache_bytes(cache), **self._code("prefill", lines)}
            return found | self._compared(logits)

        row |= tried(measure)
        if caches:
            self.notes.prefills[self.kind] = row
        return row, caches[0] if caches else None

    def decode(self, B: int, cache: Cache | None) -> dict[str, Any]:
        """Return the row of decoding with B rows after T tokens or a little more. The cache, if there is one, grows."""
        row = self._row("decode", B)
        if cache is None:
            return {**row, "failed": "no prefill"}
        if self.plan.is_over():
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

    def in_float32(self) -> dict[str, Any]:
        """Return the row of this model in float32. The original's logits become the reference of later rows."""
        row = self._row("float32", 1)
        if self.plan.is_over():
            return {**row, "failed": "out of time"}
        if self.kind != "original" and self.T not in self.notes.exact:
            return {**row, "failed": "no original in float32"}

        def measure() -> dict[str, Any]:
            wide = Reader(copy.deepcopy(self.reader.model).float(), self.family.cache_name)
            with torch.backends.cudnn.flags(allow_tf32=False), announced() as lines:
                seconds, (logits, _) = wide.seconds(lambda: wide.prefill(self.T))
            if self.kind == "original":
                self.notes.exact[self.T] = logits
            error = distance(logits, self.notes.exact[self.T])
            return {"seconds": seconds, "logits_error": error, **self._code("prefill", lines)}

        return {**row, **tried(measure)}

    def _row(self, work: str, B: int) -> dict[str, Any]:
        return {**self.named, "work": work, "B": B, "T": self.T, **self.sizes}

    def _obstacle(self) -> str | None:
        """Return the reason for which a prefill cannot succeed, by the numbers of a shorter one."""
        shorter = self.notes.prefills.get(self.kind)
        if shorter is None:
            return "out of time" if self.plan.is_over() else None
        growth = self.T / shorter["T"]
        if "peak_bytes" in shorter:
            weights = self.sizes["weight_bytes"]
            needed = round(weights + growth * (shorter["peak_bytes"] - weights))
            if needed > MEMORY_MARGIN * torch.cuda.mem_get_info()[1]:
                return f"needs about {human_bytes(needed)}"
        return "out of time" if self.plan.is_over(growth * shorter["seconds"]) else None

    def _profiled(self, token: Tensor, cache: Cache) -> dict[str, Any]:
        return {"device_seconds": self.reader.device_seconds(token, cache, PROFILED) / PROFILED}

    def _code(self, work: str, lines: list[str]) -> dict[str, Any]:
        return {"ran": self.family.implementations(work) if self.kind == "original" else lines}

    def _compared(self, logits: Tensor) -> dict[str, float]:
        """Return the distances of bfloat16 logits to those of the original, which are kept for its upgrades."""
        found = {}
        if self.T in self.notes.exact:
            found["logits_error"] = distance(logits, self.notes.exact[self.T])
        if self.kind == "original":
            self.notes.rounded[self.T] = logits
        elif self.T in self.notes.rounded:
            found["logits_difference"] = distance(logits, self.notes.rounded[self.T])
        return found


def measured(plan: Plan) -> Iterator[dict[str, Any]]:
    """Yield a row for each model, length and work: all models of a length before the next length."""
    notes = {family: Notes() for family in plan.families}
    for T in plan.lengths:
        for family in plan.families:
            if plan.is_over():
                yield from _skipped(plan, family, T)
                continue
            original = build(FAMILIES[family], plan.device, plan.layers)
            if plan.exact_length == T:
                yield Measurement(plan, family, "original", original, notes[family], T).in_float32()
            for model in _measurements(plan, family, original, notes[family], T):
                yield from model.rows()
    if plan.exact_length is not None and not plan.is_over():  # last, because their kernels must be compiled
        for family in plan.families:
            original = build(FAMILIES[family], plan.device, plan.layers)
            for model in _measurements(plan, family, original, notes[family], plan.exact_length):
                if model.kind != "original":
                    yield model.in_float32()


def _measurements(plan: Plan, family: str, original: PreTrainedModel, notes: Notes, T: int) -> Iterator[Measurement]:
    """Yield the models of a family, one after the other."""
    for kind in plan.kinds:
        gc.collect()  # the models before are in reference cycles
        yield Measurement(plan, family, kind, of_kind(original, kind, plan.lengths[-1]), notes, T)


def _skipped(plan: Plan, family: str, T: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a family for which no time is left."""
    for kind in plan.kinds:
        for work, B in (("prefill", 1), *(("decode", B) for B in BATCHES)):
            yield {"family": family, "model": kind, "work": work, "B": B, "T": T, "failed": "out of time"}


@torch.no_grad()
def measure(plan: Plan, progress: Progress, keep: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Return all rows. `keep` is called after every row."""
    rows: list[dict[str, Any]] = []
    task = progress.add_task("", total=len(plan.kinds) * len(plan.families) * len(plan.lengths) * (1 + len(BATCHES)))
    for row in measured(plan):
        rows.append(row)
        keep(rows)
        progress.advance(task)
        place = _work((row["work"], row["B"], row["T"]))
        announce(progress, task, f"{row['family']}, {row['model']}, {place}: {cell(row)}")
    return rows


def cell(row: dict[str, Any]) -> str:
    """Return the speed and the peak memory of a row, its error in float32, or the reason of its failure."""
    if "failed" in row:
        return row["failed"].splitlines()[0][:40]
    if "tokens_per_second" not in row:
        return _error(row)
    peak = f" ({human_bytes(row['peak_bytes'])})" if "peak_bytes" in row else ""
    return f"{row['tokens_per_second']:,.0f}{peak}"


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table for each family, by kind of model: speed and peak memory, the cache, and errors of the logits."""
    for family in dict.fromkeys(row["family"] for row in rows):
        mine = {(row["work"], row["B"], row["T"], row["model"]): row for row in rows if row["family"] == family}
        kinds = list(dict.fromkeys(kind for *_, kind in mine))
        works = sorted({key[:3] for key in mine}, key=lambda place: (ORDER.index(place[0]), *place[1:]))

        def line(place: tuple[str, int, int], name: str, text: Callable[[dict[str, Any]], str]) -> list[str]:
            return [name, *(text(mine.get((*place, kind), {})) for kind in kinds)]  # noqa: B023  # called at once

        table = [line(place, _work(place), cell) for place in works if place[0] != "float32"]
        prefills = [place for place in works if place[0] == "prefill"]
        table += [line(place, f"cache, T {place[2]:,}", _cache) for place in prefills]
        for place in works:
            if any("logits_error" in mine.get((*place, kind), {}) for kind in kinds):
                table.append(line(place, f"logits error, {'float32' if place[0] == 'float32' else 'bfloat16'}", _error))
        sizes = [row["parameters"] for row in mine.values() if "parameters" in row]
        title = f"{family}, {sizes[0] if sizes else 0:,} parameters: tokens a second (memory at the peak)"
        print_table(f"{title}; cache: linear + full attention", ["", *kinds], table)


def _work(place: tuple[str, int, int]) -> str:
    return f"{place[0]}, B {place[1]}, T {place[2]:,}"


def _cache(row: dict[str, Any]) -> str:
    if "state_bytes" not in row:
        return "-"
    return f"{human_bytes(row['state_bytes'])} + {human_bytes(row['key_value_bytes'])}"


def _error(row: dict[str, Any]) -> str:
    return f"{row['logits_error']:.1e}" if "logits_error" in row else "-"


_lengths = typer.Option(help="Tokens of a prefill; repeatable.", show_default="2048, 16384, 131072; on a CPU 64, 256")


def main(
    device: Annotated[str, typer.Option(help="cpu, with tiny models, or cuda.")] = "cpu",
    family: Annotated[list[str] | None, typer.Option(help="A family; repeatable. All without it.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A kind of model; repeatable. All without it.")] = None,
    lengths: Annotated[list[int] | None, _lengths] = None,
    steps: Annotated[int, typer.Option(help="Timed steps of decoding.")] = 8,
    layers: Annotated[
        int | None, typer.Option(help="Layers of each model, at least 4.", show_default="as published")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Minutes after which no further row begins.")] = 3.0,
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
    plan = Plan(device, *chosen, sorted(set(lengths or LENGTHS[device])), steps, layers, end)
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

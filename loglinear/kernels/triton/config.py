"""Which chunk, tiles and warps the kernels run with: a table of measured choices, and what to do without one.

The table is keyed by GPU, K, V, dtype and a bucket of the length. `tuned.json` beside this file ships with the package;
`loglinear tune` writes more of it to a file of the user's (LOGLINEAR_TUNED, or tuned.json in the cache folder).
Nothing is ever measured in a call: a shape that no table has gets the defaults.
"""

# C chunk, K key, V value, T time
from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)
SHIPPED = Path(__file__).with_name("tuned.json")
STAGES = {
    "forward": ("chunk_state", "up_sweep", "output"),
    "backward": (
        "chunk_state", "up_sweep", "walk_backward", "in_chunk_backward", "state_backward", "down_sweep",
        "chunk_state_backward",
    ),
}  # fmt: skip
BUCKETS = (2048, 8192, 32768)  # lengths up to each share a choice, and all that are longer


@dataclass(frozen=True)
class Launch:
    """Columns of V (or numbers of a state) in one program, and the compiler's options."""

    tile: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return dict(num_warps=self.num_warps, num_stages=self.num_stages)


@dataclass(frozen=True)
class Plan:
    chunk_size: int
    stages: dict[str, Launch]

    def __getitem__(self, stage: str) -> Launch:
        return self.stages[stage]

    def to_json(self) -> dict[str, Any]:
        stages = {name: [x.tile, x.num_warps, x.num_stages] for name, x in self.stages.items()}
        return {"chunk_size": self.chunk_size, "stages": stages}

    @classmethod
    def from_json(cls, plan: dict[str, Any]) -> Plan:
        return cls(plan["chunk_size"], {name: Launch(*launch) for name, launch in plan["stages"].items()})


def user_table() -> Path:
    """Where `loglinear tune` writes."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "loglinear" / "tuned.json"
    return Path(os.environ.get("LOGLINEAR_TUNED", cache))


def table_key(direction: str, K: int, V: int, dtype: torch.dtype, tokens: int) -> str:
    bucket = next((f"T<={size}" for size in BUCKETS if tokens <= size), f"T>{BUCKETS[-1]}")
    return f"{direction} K={K} V={V} {str(dtype).removeprefix('torch.')} {bucket}"


def choose(
    direction: str, K: int, V: int, dtype: torch.dtype, tokens: int, device: torch.device, chunk_size: int | None = None
) -> Plan:
    """The plan of a call; with a chunk_size, which states prescribe, the measured one for it or the defaults."""
    key = table_key(direction, K, V, dtype, tokens)
    measured = _tables().get(_device_name(device), {}).get(key)
    if measured is not None and chunk_size in (None, measured.chunk_size):
        return measured
    return default_plan(direction, K, V, dtype, chunk_size)


@lru_cache
def default_plan(direction: str, K: int, V: int, dtype: torch.dtype, chunk_size: int | None = None) -> Plan:
    """What every supported shape can be launched with; for the paper's shape the measured best on an H100."""
    wide = max(K, V) > 128
    if dtype != torch.bfloat16:  # products and states in float32
        C = chunk_size or (32 if wide else 64)
        tile, sweep = 32, Launch(64, 4, 1)
        launch = dict.fromkeys(STAGES[direction], Launch(tile, 4, 1))
    else:
        C = chunk_size or (64 if wide else 128)
        sweep = Launch(128, 4, 3)
        launch = dict.fromkeys(STAGES[direction], Launch(64, 4, 2))
        launch["chunk_state"] = Launch(64, 8 if C > 64 else 4, 2 if wide else 3)
        if direction == "backward":
            launch["in_chunk_backward"] = Launch(64, 4, 1 if wide else 2)
            launch |= dict.fromkeys(("walk_backward", "chunk_state_backward"), Launch(64, 4, 1 if wide else 3))
    launch |= {name: sweep for name in launch if name.endswith("sweep")}
    return Plan(C, launch)


@lru_cache
def _tables() -> dict[str, dict[str, Plan]]:
    """GPU name -> key -> plan; the user's entries before the shipped ones."""
    tables: dict[str, dict[str, Plan]] = {}
    for path in (SHIPPED, user_table()):
        if not path.exists():
            continue
        try:
            for gpu, plans in json.loads(path.read_text()).items():
                tables.setdefault(gpu, {}).update({key: Plan.from_json(plan) for key, plan in plans.items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s is not a table of tuned kernels (%r): left aside", path, error)
    return tables


@lru_cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

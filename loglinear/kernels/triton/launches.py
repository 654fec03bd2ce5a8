"""The chunk, tiles and warps that the kernels run with: a table of measured choices, and rules without one.

The table is keyed by GPU, operator, K, V, dtype and a bucket of the length. `tuned.json` beside this file ships with
the package; `loglinear tune` writes more of it to a file of the user's (LOGLINEAR_TUNED, or tuned.json in the cache
folder). No call measures anything: a shape that no table has gets the defaults.
"""

# C chunk, K key, V value, T time
from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

logger = logging.getLogger(__name__)
SHIPPED = Path(__file__).with_name("tuned.json")
DELTA_RULE_BUILD = ("chunk_state", "run_scan", "carry_in")
DELTA_RULE_BACKWARD = (
    *DELTA_RULE_BUILD,
    "in_chunk",
    "walk_backward",
    "state_backward",
    "prefix_backward",
    "carried_backward",
    "carry_in_states_backward",
    "carry_in_prefixes_backward",
    "run_scan_backward",
    "transition_backward",
    "scores_backward",
    "writes_backward",
    "lower_backward",
)
STAGES = {
    "scalar_gate": {
        "forward": ("chunk_state", "up_sweep", "output"),
        "backward": (
            "chunk_state",
            "up_sweep",
            "walk_backward",
            "in_chunk_backward",
            "state_backward",
            "down_sweep",
            "chunk_state_backward",
        ),
    },
    "diagonal_gate": {
        "forward": ("decayed_rows", "chunk_state", "up_sweep", "output"),
        "backward": (
            "decayed_rows",
            "chunk_state",
            "up_sweep",
            "scores_backward",
            "walk_backward",
            "state_backward",
            "down_sweep",
            "writes_backward",
            "decayed_rows_backward",
        ),
    },
    "delta_rule": {
        "forward": ("chunk_inverse", *DELTA_RULE_BUILD, "output"),
        "backward": (*DELTA_RULE_BACKWARD, "keys_backward", "decay_backward"),
    },
    "diagonal_delta_rule": {
        "forward": ("decayed_rows", "chunk_inverse", *DELTA_RULE_BUILD, "output"),
        "backward": ("decayed_rows", *DELTA_RULE_BACKWARD, "decayed_rows_backward"),
    },
}
BUCKETS = (2048, 8192, 32768)  # lengths up to each share a choice, and all that are longer


class Launch(NamedTuple):
    """The tile of one program, and the compiler's options.

    Args:
        value_tile: Columns of V, or right of a state's K rows; numbers of a state in a sweep.
        key_tile: Columns of K, of the delta rule's kernels and of the diagonal gate's with decays inside chunks. The
            other kernels take all of them.
        registers: A thread's at most, where a few less let one program more share a multiprocessor.
    """

    value_tile: int = 64
    key_tile: int = 64
    num_warps: int = 4
    num_stages: int = 1
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, maxnreg=self.registers)

    def to_json(self) -> dict[str, Any]:
        """Return the fields that differ from the defaults."""
        return {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}


@dataclass(frozen=True)
class Plan:
    """The chunk size of a call, and the launch of each stage."""

    chunk_size: int
    stages: dict[str, Launch]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.chunk_size, tuple(sorted(self.stages.items()))))

    def __getitem__(self, stage: str) -> Launch:
        return self.stages[stage]

    def to_json(self) -> dict[str, Any]:
        return {"chunk_size": self.chunk_size, "stages": {name: x.to_json() for name, x in self.stages.items()}}

    @classmethod
    def from_json(cls, plan: dict[str, Any]) -> Plan:
        return cls(plan["chunk_size"], {name: Launch(**launch) for name, launch in plan["stages"].items()})


class Kind(NamedTuple):
    """The calls that share a plan but for their length: operator (a key of STAGES), direction ("forward",
    "backward"), head widths, and the dtype of the products."""

    operator: str
    direction: str
    K: int
    V: int
    dtype: torch.dtype

    @property
    def stages(self) -> tuple[str, ...]:
        return STAGES[self.operator][self.direction]


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` and `triton.next_power_of_2` take a host's microsecond."""
    return -(-a // b)


def tile_width(columns: int) -> int:
    """The width of a tile that holds so many columns: a power of 2, at least the 16 of a product."""
    return max(16, 1 << (columns - 1).bit_length())


def user_table() -> Path:
    """The file that `loglinear tune` writes."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "loglinear" / "tuned.json"
    return Path(os.environ.get("LOGLINEAR_TUNED", cache))


def table_key(kind: Kind, tokens: int) -> str:
    return _key(kind, _bucket(tokens))


def _bucket(tokens: int) -> str:
    return next((f"T<={size}" for size in BUCKETS if tokens <= size), f"T>{BUCKETS[-1]}")


def _key(kind: Kind, bucket: str) -> str:
    dtype = str(kind.dtype).removeprefix("torch.")
    return f"{kind.operator} {kind.direction} K={kind.K} V={kind.V} {dtype} {bucket}"


def choose(kind: Kind, tokens: int, device: torch.device, chunk_size: int | None = None) -> Plan:
    """The plan of a call; with a chunk_size, which states prescribe, the measured one for it or the defaults.

    Stages that the table does not have, because the measured call had none of them, take their defaults.
    """
    return _choose(kind, _bucket(tokens), device, chunk_size)


@lru_cache
def _choose(kind: Kind, bucket: str, device: torch.device, chunk_size: int | None) -> Plan:
    measured = _tables().get(_device_name(device), {}).get(_key(kind, bucket))
    if measured is None or chunk_size not in (None, measured.chunk_size):
        return default_plan(kind, chunk_size)
    return replace(measured, stages=default_plan(kind, measured.chunk_size).stages | measured.stages)


@lru_cache
def default_plan(kind: Kind, chunk_size: int | None = None) -> Plan:
    """The plan of every supported shape; for the paper's shapes the measured best on an H100."""
    return _DEFAULTS[kind.operator](kind, chunk_size)


def _scalar_gate(kind: Kind, chunk_size: int | None) -> Plan:
    wide = max(kind.K, kind.V) > 128
    if kind.dtype != torch.bfloat16:  # products and states in float32
        C = chunk_size or (32 if wide else 64)
        launches = dict.fromkeys(kind.stages, Launch(32))
        sweep = Launch()
    else:
        C = chunk_size or (64 if wide else 128)
        launches = dict.fromkeys(kind.stages, Launch(num_stages=2))
        sweep = Launch(128, num_stages=3)
        launches["chunk_state"] = Launch(num_warps=8 if C > 64 else 4, num_stages=2 if wide else 3)
        if kind.direction == "backward":
            launches["in_chunk_backward"] = Launch(num_stages=1 if wide else 2)
            launches |= dict.fromkeys(("walk_backward", "chunk_state_backward"), Launch(num_stages=1 if wide else 3))
    return Plan(C, launches | {name: sweep for name in launches if name.endswith("sweep")})


def _diagonal_gate(kind: Kind, chunk_size: int | None) -> Plan:
    """Chosen by the registers that the compiler needs (benchmarks/resources.py), not by measured times.

    With eight warps Triton 3.6 miscompiles `scores_backward` in float32 for compute capability 9.0.
    """
    wide, is_bfloat16 = max(kind.K, kind.V) > 128, kind.dtype == torch.bfloat16
    launches = dict.fromkeys(kind.stages, Launch(64, num_warps=8) if is_bfloat16 else Launch(32))
    for name in launches:
        if name.endswith("sweep"):
            launches[name] = Launch(128 if is_bfloat16 else 64)
        elif name.startswith("decayed_rows"):
            launches[name] = decayed_rows_launch(kind)
    return Plan(chunk_size or (32 if wide else 64), launches)


def decayed_rows_launch(kind: Kind, warps_in_bfloat16: int = 4) -> Launch:
    """That of the stages with the decays inside chunks: wider tiles would spill."""
    return Launch(key_tile=32, num_warps=warps_in_bfloat16) if kind.dtype == torch.bfloat16 else Launch(key_tile=16)


# Measured on an H100 (docs/lab-notes/2026-11-24-delta-rule-kernels.md): bfloat16 products of K up to 128, and of more.
# Warps are for tiles of more than 64 rows; a loop that reads what it wrote has one stage. All others take Launch().
NARROW = {
    "chunk_inverse": Launch(64, 128),
    "chunk_state": Launch(64, 128, 8, registers=64),
    "run_scan": Launch(64, 128, 8, registers=128),
    "carry_in": Launch(64, 128, 8),
    "output": Launch(128, 128),
    "in_chunk": Launch(num_stages=3),
    "walk_backward": Launch(64, 128, num_stages=2),
    "state_backward": Launch(64, 128),
    "prefix_backward": Launch(128, 128, 8),
    "carried_backward": Launch(64, 128),
    "carry_in_states_backward": Launch(64, 128, 8),
    "carry_in_prefixes_backward": Launch(128, 128, 8),
    "run_scan_backward": Launch(64, 128, 8),
    "transition_backward": Launch(64, 128),
    "writes_backward": Launch(64, 64, 8),
    "lower_backward": Launch(64, 128, num_stages=2),
    "keys_backward": Launch(64, 128),
    "decay_backward": Launch(64, 128),
}
WIDE = {
    "chunk_state": Launch(128, num_stages=2),
    "run_scan": Launch(registers=168),
    "output": Launch(128, num_stages=2),
    "in_chunk": Launch(num_stages=2),
    "walk_backward": Launch(num_stages=3),
    "state_backward": Launch(128),
    "prefix_backward": Launch(64, 64, 8),
    "carried_backward": Launch(128, num_stages=2),
    "run_scan_backward": Launch(registers=168),
    "scores_backward": Launch(num_stages=2),
    "writes_backward": Launch(64, 64, 8),
}
# The delta rule's stages on tiles of a chunk's tokens, and in how many parts they take a chunk of 128.
PARTS = {
    "chunk_state": 1,
    "output": 2,
    "in_chunk": 2,
    "walk_backward": 2,
    "state_backward": 1,
    "prefix_backward": 1,
    "carried_backward": 1,
    "scores_backward": 2,
    "writes_backward": 1,
    "lower_backward": 2,
    "keys_backward": 2,
}


def parts_of(stage: str, C: int) -> int:
    """In how many parts a stage of the delta rule takes a chunk."""
    return PARTS[stage] if C > 64 else 1


def _delta_rule(kind: Kind, chunk_size: int | None) -> Plan:
    C = chunk_size or (128 if kind.dtype == torch.bfloat16 else 64)
    table = {} if kind.dtype != torch.bfloat16 else NARROW if kind.K <= 128 else WIDE

    def fitted(stage: str) -> Launch:
        launch = table.get(stage, Launch())
        key_tile = min(launch.key_tile, tile_width(kind.K))
        rows = C // parts_of(stage, C) if stage in PARTS else key_tile
        return launch if rows > 64 or launch.num_warps == 4 else launch._replace(num_warps=4, registers=None)

    return Plan(C, {stage: fitted(stage) for stage in kind.stages})


def _diagonal_delta_rule(kind: Kind, chunk_size: int | None) -> Plan:
    """Not measured on any GPU: that of the delta rule, and of the diagonal gate's own stages."""
    plan = _delta_rule(kind, chunk_size or 64)
    own = {name: decayed_rows_launch(kind, 8) for name in kind.stages if name.startswith("decayed_rows")}
    return replace(plan, stages=plan.stages | own)


_DEFAULTS = {
    "scalar_gate": _scalar_gate,
    "diagonal_gate": _diagonal_gate,
    "delta_rule": _delta_rule,
    "diagonal_delta_rule": _diagonal_delta_rule,
}


def forget_tables() -> None:
    """Read the tables again, and choose again."""
    _tables.cache_clear()
    _choose.cache_clear()


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

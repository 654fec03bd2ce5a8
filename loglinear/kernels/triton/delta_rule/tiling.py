"""The tiles of each stage's arrays, one for a program, and the compiler's options for its kernel."""

# C chunk, K key, V value
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton


class Launch(NamedTuple):
    """Columns of a tile at most, of the keys and of a state; warps for tiles of more than 64
    rows; stages of the pipeline, one where a loop reads what it wrote; registers of a thread at most, where a few less
    let one program more share a multiprocessor."""

    TK: int = 64
    BV: int = 64
    num_warps: int = 4
    num_stages: int = 1
    registers: int | None = None


# Measured on an H100 (docs/lab-notes/2026-11-24-delta-rule-kernels.md): bfloat16 products of K up to 128, and of more.
# All others take Launch().
NARROW = {
    "chunk_inverse": Launch(128), "chunk_state": Launch(128, 64, 8, registers=64),
    "run_scan": Launch(128, 64, 8, registers=128), "carry_in": Launch(128, 64, 8), "output": Launch(128, 128),
    "in_chunk": Launch(num_stages=3), "walk_backward": Launch(128, 64, num_stages=2),
    "state_backward": Launch(128), "prefix_backward": Launch(128, 128, 8), "carried_backward": Launch(128),
    "carry_in_states_backward": Launch(128, 64, 8), "carry_in_prefixes_backward": Launch(128, 128, 8),
    "run_scan_backward": Launch(128, 64, 8), "transition_backward": Launch(128),
    "writes_backward": Launch(64, 64, 8), "lower_backward": Launch(128, num_stages=2),
    "keys_backward": Launch(128), "decay_backward": Launch(128),
}  # fmt: skip
WIDE = {
    "chunk_state": Launch(64, 128, num_stages=2), "run_scan": Launch(registers=168),
    "output": Launch(64, 128, num_stages=2), "in_chunk": Launch(num_stages=2), "walk_backward": Launch(num_stages=3),
    "state_backward": Launch(64, 128), "prefix_backward": Launch(64, 64, 8),
    "carried_backward": Launch(64, 128, num_stages=2), "run_scan_backward": Launch(registers=168),
    "scores_backward": Launch(num_stages=2), "writes_backward": Launch(64, 64, 8),
}  # fmt: skip
# Stages on tiles of a chunk's tokens, and in how many parts they take a chunk of 128.
PARTS = {
    "chunk_state": 1, "output": 2, "in_chunk": 2, "walk_backward": 2, "state_backward": 1,
    "prefix_backward": 1, "carried_backward": 1, "scores_backward": 2, "writes_backward": 1, "lower_backward": 2,
    "keys_backward": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Tiling:
    """The tiles of all stages for one size of heads and chunk; dtype: what is multiplied, and kept of each chunk."""

    K: int
    V: int
    C: int
    dtype: torch.dtype

    def launch(self, stage: str) -> Launch:
        if self.dtype != torch.bfloat16:
            return Launch()
        return (NARROW if self.K <= 128 else WIDE).get(stage, Launch())

    def key_tile(self, stage: str) -> int:
        """Columns of a tile of an array that is K wide."""
        return min(self.launch(stage).TK, max(16, triton.next_power_of_2(self.K)))

    def parts(self, stage: str) -> int:
        return PARTS[stage] if self.C > 64 else 1

    def options(self, stage: str) -> dict[str, int | None]:
        """The tile of the keys' columns, and the compiler's."""
        launch, TK = self.launch(stage), self.key_tile(stage)
        rows = self.C // self.parts(stage) if stage in PARTS else TK
        num_warps = launch.num_warps if rows > 64 else 4
        registers = launch.registers if num_warps == launch.num_warps else None
        return dict(TK=TK, num_warps=num_warps, num_stages=launch.num_stages, maxnreg=registers)

    def columns(self, stage: str, transition: bool = False) -> dict[str, int]:
        """The columns of a state, or of a transition, and of its tile."""
        width = self.K if transition else self.V
        return dict(V=width, BV=min(self.launch(stage).BV, max(16, triton.next_power_of_2(width))))

    def wide(self, stage: str, transition: bool = False) -> dict[str, int | None]:
        return self.columns(stage, transition) | self.options(stage)

    def tiles(self, stage: str, transition: bool = False) -> int:
        """The tiles that a state, or a transition, has across."""
        columns = self.columns(stage, transition)
        return triton.cdiv(columns["V"], columns["BV"])

    def column_tiles(self, stage: str) -> int:
        """The tiles that [states | transitions] have across."""
        BV = self.columns(stage)["BV"]
        return triton.cdiv(self.V, BV) + triton.cdiv(self.K, BV)

    def key_tiles(self, stage: str) -> int:
        """The tiles of an array that is K wide."""
        return triton.cdiv(self.K, self.key_tile(stage))

    def all_tiles(self, stage: str) -> int:
        """The tiles of a state."""
        return self.key_tiles(stage) * self.tiles(stage)

    def square_tiles(self, stage: str) -> int:
        """The square tiles of a transition."""
        return self.key_tiles(stage) ** 2

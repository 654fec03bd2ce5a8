"""`loglinear tune`: measure the GPU kernels' plans for a shape and keep the fastest."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console


def run(
    heads: int, groups: int, key_dim: int, value_dim: int, dtype: str, lengths: list[int], batch: int, out: Path | None
) -> None:
    """Raises ValueError without a GPU, or for a shape that the kernels do not take."""
    if not torch.cuda.is_available():
        raise ValueError("tune needs a CUDA GPU, and this machine has none")
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in dtypes:
        raise ValueError(f"--dtype must be one of {list(dtypes)}, got {dtype!r}")
    if heads % groups:
        raise ValueError(f"--heads {heads} must be a multiple of --groups {groups}")
    from loglinear.kernels.triton.config import STAGES, user_table
    from loglinear.kernels.triton.tune import Shape, compile_candidates, tune, write

    console = Console()
    path = out or user_table()
    for direction in STAGES:
        shape = Shape(batch, max(lengths), groups, heads, key_dim, value_dim, dtypes[dtype])
        with console.status(f"{direction}: compiling the candidates"):
            compile_candidates(direction, shape)
        for length in sorted(lengths):
            shape = Shape(batch, length, groups, heads, key_dim, value_dim, dtypes[dtype])
            with console.status(f"{direction}, T {length}: measuring"):
                plan, ms = tune(direction, shape)
            write(path, direction, shape, plan)
            console.print(
                f"{direction}, T {length}: {ms:.3f} ms with chunk {plan.chunk_size}, {plan.to_json()['stages']}"
            )
    console.print(f"written to {path}")

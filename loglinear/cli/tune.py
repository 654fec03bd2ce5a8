"""`loglinear tune`: measure the GPU kernels' plans for a shape and keep the fastest."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from loglinear.ops.impl_triton import MAX_HEAD_DIM


def run(
    heads: int, groups: int, key_dim: int, value_dim: int, dtype: str, lengths: list[int], batch: int, out: Path | None
) -> None:
    """Measure each length and write the fastest plans.

    Raises ValueError without a GPU, and for a shape that the kernels do not take.
    """
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in dtypes:
        raise ValueError(f"--dtype must be one of {list(dtypes)}, got {dtype!r}")
    if min(heads, groups) < 1 or heads % groups:
        raise ValueError(f"--heads {heads} must be a multiple of --groups {groups}, both at least 1")
    if not (1 <= key_dim <= MAX_HEAD_DIM and 1 <= value_dim <= MAX_HEAD_DIM):
        raise ValueError(f"--key-dim and --value-dim must be 1 to {MAX_HEAD_DIM}, got {key_dim} and {value_dim}")
    if min(*lengths, batch) < 1:
        raise ValueError(f"--length and --batch must be at least 1, got {lengths} and {batch}")
    if not torch.cuda.is_available():
        raise ValueError("tune needs a CUDA GPU, and this machine has none")
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

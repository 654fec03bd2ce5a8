"""`loglinear tune`: measure the GPU kernels' plans for a shape and keep the fastest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console


class Heads(NamedTuple):
    """The heads of one call, the number of its sequences, and its operator."""

    heads: int
    groups: int
    key_dim: int
    value_dim: int
    dtype: str
    batch: int
    operator: str


def run(of: Heads, lengths: list[int], out: Path | None) -> None:
    """Measure each length and write the fastest plans.

    Raises ValueError without a GPU, and for a shape that the kernels do not take.
    """
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    heads, groups, key_dim, value_dim, dtype, batch, operator = of
    if dtype not in dtypes:
        raise ValueError(f"--dtype must be one of {list(dtypes)}, got {dtype!r}")
    if min(heads, groups) < 1 or heads % groups:
        raise ValueError(f"--heads {heads} must be a multiple of --groups {groups}, both at least 1")
    if min(*lengths, batch) < 1:
        raise ValueError(f"--length and --batch must be at least 1, got {lengths} and {batch}")
    if not torch.cuda.is_available():
        raise ValueError("tune needs a CUDA GPU, and this machine has none")
    from loglinear.kernels.triton.launches import STAGES, user_table
    from loglinear.kernels.triton.limits import MAX_HEAD_DIM, widest_value
    from loglinear.kernels.triton.tune import Shape, compile_candidates, tune, write

    widest = widest_value(operator == "delta_rule")
    if not (1 <= key_dim <= MAX_HEAD_DIM and 1 <= value_dim <= widest):
        got = f"{key_dim} and {value_dim}"
        raise ValueError(f"--key-dim must be 1 to {MAX_HEAD_DIM}, --value-dim 1 to {widest}, got {got}")
    console = Console()
    path = out or user_table()
    for direction in STAGES[operator]:
        shape = Shape(batch, max(lengths), groups, heads, key_dim, value_dim, dtypes[dtype], operator)
        with console.status(f"{direction}: compiling the candidates"):
            compile_candidates(direction, shape)
        for length in sorted(lengths):
            shape = replace(shape, T=length)
            with console.status(f"{direction}, T {length}: measuring"):
                plan, ms = tune(direction, shape)
            write(path, direction, shape, plan)
            console.print(
                f"{direction}, T {length}: {ms:.3f} ms with chunk {plan.chunk_size}, {plan.to_json()['stages']}"
            )
    console.print(f"written to {path}")

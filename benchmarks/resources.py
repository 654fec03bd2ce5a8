"""Registers, spilled bytes and shared memory of every compiled kernel, without a GPU.

    python -m benchmarks.resources --key-dim 128 --value-dim 64      # the default plans, compute capability 9.0
    python -m benchmarks.resources --delta --value-dim 128           # the delta rule's

A program on an H100 has at most 255 registers a thread and 227 KiB of shared memory; "stack" is the part that
did not fit. This needs triton, any build, because its assembler comes with it. TRITON_INTERPRET must not be set.
"""

# C chunk, K key, V value
from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.machine import announce, command_line, progress_bar
from loglinear.cli.console import print_table
from loglinear.fenwick import log2
from loglinear.kernels.triton.call import DOT_TYPES
from loglinear.kernels.triton.config import STAGES, Launch, default_plan
from loglinear.kernels.triton.delta_rule import launch as delta_stages
from loglinear.kernels.triton.delta_rule.products import choose_chunk_size, dots_of, products_of, state_dtype
from loglinear.kernels.triton.delta_rule.tiles import SIZES
from loglinear.kernels.triton.delta_rule.tiling import PARTS, Tiling
from loglinear.kernels.triton.scalar_gate import launch as stages
from loglinear.ops.impl_triton import MAX_HEAD_DIM

CHUNK_SIZES = (16, 32, 64, 128)  # of the scalar gate
ABSENT = {"table", "chunk_table", "runs", "nodes", "dnodes", "first_runs"}  # dense batches that begin at 0
WORKING = {  # in the inputs' dtype, the other arrays in float32
    "q", "k", "v", "do", "out", "dv", "slots", "dslots", "dscores", "dq", "dk", "inverse", "blocks", "transitions",
    "states", "kept", "ends", "prefixes", "carried", "brought", "dbrought", "dreads", "dkept", "dends", "dprefixes",
    "end_transitions", "dend_transitions", "dseen", "dtransitions", "dcarried", "weights", "effective",
    "seen", "dstates", "dlower",
}  # fmt: skip
POINTERS = WORKING | {
    "log_decay", "level_scales", "totals", "next_totals", "cumulative", "log_p", "dlevel_scales", "cross_scales",
    "walk_flow", "row_flow", "column_flow", "state_flow", "read_paths", "beyond", "dlog_p", "dtotals", "prefix_totals",
    "end_totals",
    "beta", "flow", "held", "shares", "sums", "dkeys", "dbeta", "dlog_decay",
}  # fmt: skip
UNALIGNED = {  # strides of H and of L numbers, and counts
    "g_b", "g_t", "g_h", "l_b", "l_t", "l_h", "dl_t", "beta_b", "beta_t", "beta_h", "db_t", "dg_t",
}  # fmt: skip


def compiled(
    kernel: Any, constants: dict[str, Any], launch: Launch, dtype: torch.dtype, maxnreg: int | None = None
) -> Any:
    """Return the kernel, compiled as `launch.py` compiles it for a dense batch."""
    types: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    hints: dict[tuple[int], Any] = {}
    aligned = [["tt.divisibility", 16]]
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in ABSENT:
            types[name], values[(place,)] = "constexpr", constants.get(name)
        elif name in POINTERS:
            element = "bf16" if name in WORKING and dtype == torch.bfloat16 else "fp32"
            types[name], hints[(place,)] = f"*{element}", aligned
        elif name == "scale":
            types[name] = "fp32"
        else:
            types[name] = "i64" if "plane" in name else "i32"
            if name not in SIZES and name not in UNALIGNED:
                hints[(place,)] = aligned
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=hints)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "maxnreg": maxnreg}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(binary: Any) -> tuple[int, int, int]:
    """Return registers a thread, bytes of stack a thread and bytes of shared memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None, report
    return int(found[1]), int(found[2]), binary.metadata.shared


def constants(stage: str, direction: str, K: int, V: int, C: int, tile: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the constants of a scalar-gate kernel."""
    _, dot, precision = DOT_TYPES[dtype]
    return dict(
        K=K, V=V, C=C, BK=max(16, triton.next_power_of_2(K)), BV=min(tile, max(16, triton.next_power_of_2(V))),
        DOT=dot, PRECISION=precision, PACKED=False, NODES=False, LOG_C=log2(C), HALVES=2 if C > stages.ROWS else 1,
        SPLIT=1, RUNS=False, LINEAR=False, LEVELS=1, CROSS=False,
        J=min(stages.ROWS, C), LOG_J=log2(min(stages.ROWS, C)), SIZE=K * V, E=tile, STEPS=stages.SWEEP_STEPS,
    )  # fmt: skip


def delta_jobs(K: int, V: int, dtype: torch.dtype) -> list[tuple[str, str, int, dict[str, Any], Launch]]:
    """Return direction, stage, chunk, constants and launch of the delta rule's kernels."""
    k, v = torch.empty(1, 1, 1, K, dtype=dtype), torch.empty(1, 1, 1, V, dtype=dtype)
    C = choose_chunk_size(k, k, v, 0)
    tiling, jobs = Tiling(K, V, C, state_dtype(k, k, v)), []
    for direction, names in delta_stages.STAGES.items():
        for stage in names:
            options: dict[str, Any] = dict(tiling.wide(stage))
            launch = Launch(options["TK"], options.pop("num_warps"), options.pop("num_stages"))
            values = dict(
                K=K, C=C, J=min(C, 64), LOG_J=log2(min(C, 64)), LOG_C=log2(C), PACKED=False, NODES=False, LINEAR=False,
                ENDS=True, TRANSITION=False, PARTS=tiling.parts(stage) if stage in PARTS else 1,
                KEY_TILES=tiling.key_tiles("writes_backward"), VALUE_TILES=tiling.tiles("writes_backward"),
                **dots_of(stage, products_of(k, k, v)), **options,
            )  # fmt: skip
            jobs.append((direction, stage, C, values, launch))
    return jobs


def scalar_jobs(
    K: int, V: int, dtype: torch.dtype, chunk_size: int | None
) -> list[tuple[str, str, int, dict[str, Any], Launch]]:
    """Return direction, stage, chunk, constants and launch of the scalar gate's kernels."""
    jobs = []
    for direction, names in STAGES.items():
        plan = default_plan(direction, K, V, dtype, chunk_size)
        for stage in names:
            launch = plan.stages[stage]
            values = constants(stage, direction, K, V, plan.chunk_size, launch.tile, dtype)
            jobs.append((direction, stage, plan.chunk_size, values, launch))
    return jobs


def main(
    key_dim: Annotated[int, typer.Option(help="Width of a query or key.")] = 128,
    value_dim: Annotated[int, typer.Option(help="Width of a value.")] = 64,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    chunk_size: Annotated[int | None, typer.Option(help="Chunk size of a state, for the scalar gate.")] = None,
    delta: Annotated[bool, typer.Option("--delta", help="Compile the delta rule's kernels.")] = False,
) -> None:
    """Print the registers, stack and shared memory of the default plans' kernels."""
    if dtype not in ("bfloat16", "float16", "float32"):
        raise typer.BadParameter(f"--dtype must be bfloat16, float16 or float32, got {dtype!r}")
    widest = 2 * MAX_HEAD_DIM if delta else MAX_HEAD_DIM
    if not (1 <= key_dim <= MAX_HEAD_DIM and 1 <= value_dim <= widest):
        got = f"{key_dim} and {value_dim}"
        raise typer.BadParameter(f"--key-dim must be 1 to {MAX_HEAD_DIM}, --value-dim to {widest}, got {got}")
    if chunk_size is not None and chunk_size not in CHUNK_SIZES:
        raise typer.BadParameter(f"--chunk-size must be one of {', '.join(map(str, CHUNK_SIZES))}, got {chunk_size}")
    of = getattr(torch, dtype)
    jobs = delta_jobs(key_dim, value_dim, of) if delta else scalar_jobs(key_dim, value_dim, of, chunk_size)
    rows = []
    with progress_bar() as progress:
        task = progress.add_task("", total=len(jobs))
        for direction, stage, chunk, values, launch in jobs:
            announce(progress, task, f"{direction}, {stage}")
            kernel = getattr(delta_stages if delta else stages, f"{stage}_kernel")
            registers, stack, shared = resources(compiled(kernel, values, launch, of, values.pop("maxnreg", None)))
            tiles = f"{launch.tile} x {values['BV']}" if delta else launch.tile
            options = f"{tiles}, {launch.num_warps}, {launch.num_stages}"
            rows.append([direction, stage, *map(str, (chunk, options, registers, stack)), f"{shared / 1024:.0f}"])
            progress.advance(task)
    columns = ["direction", "stage", "chunk", "tiles, warps, stages", "registers", "stack", "shared KiB"]
    print_table(f"K {key_dim}, V {value_dim}, {dtype}, sm_90, triton {triton.__version__}", columns, rows)


if __name__ == "__main__":
    command_line(main, "resources")

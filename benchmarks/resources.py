"""Registers, spilled bytes and shared memory of every compiled kernel, without a GPU.

    python -m benchmarks.resources --key-dim 128 --value-dim 64      # the default plans, compute capability 9.0
    python -m benchmarks.resources --delta --value-dim 128           # the delta rule's
    python -m benchmarks.resources --diagonal --value-dim 128        # the diagonal gate's; with --delta of both

One forward and one backward are called; each launch is compiled and not run. A program on an H100 has at most 255
registers a thread and 227 KiB of shared memory; "stack" is the part that did not fit. This needs triton, any build,
because its assembler comes with it. TRITON_INTERPRET must not be set.
"""

# C chunk, K key, V value
from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.machine import announce, command_line, progress_bar
from loglinear.cli.console import print_table
from loglinear.kernels.triton import chunkwise
from loglinear.kernels.triton.limits import MAX_HEAD_DIM, widest_value
from loglinear.partition import FENWICK

CHUNK_SIZES = (16, 32, 64, 128)
TOKENS, LEVELS = 128 * 70, 20  # enough chunks for every kernel of a dense batch


class Hopper:
    """A driver of Triton with a target and no device."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def compiled_only(found: dict[str, Any], on_launch: Any = lambda name: None) -> Iterator[None]:
    """Compile the launches of a block for Hopper and run none; `found` gets each kernel, by its name and constants."""
    run = JITFunction.run

    def compile_launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        name = self.__name__.removesuffix("_kernel")
        on_launch(name)
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found[f"{name} {kernel.hash}"] = kernel
        return kernel

    driver.set_active(Hopper())
    JITFunction.run = compile_launch
    try:
        yield
    finally:
        JITFunction.run = run


def dump(kernel: Any, what: str) -> str:
    """Return what cuobjdump says of a kernel: "resource-usage" or "sass", its machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, f"--dump-{what}", file.name], capture_output=True, text=True, check=True).stdout


def resources(kernel: Any) -> tuple[int, int, int]:
    """Return registers a thread, bytes of stack a thread and bytes of shared memory."""
    report = dump(kernel, "resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None, report
    return int(found[1]), int(found[2]), kernel.metadata.shared


def constants(kernel: Any) -> dict[str, Any]:
    """Return the compile-time constants of a kernel, by name."""
    return {
        kernel.src.fn.arg_names[place[0]]: value for place, value in kernel.src.constants.items() if len(place) == 1
    }


def call(K: int, V: int, dtype: torch.dtype, chunk_size: int, *, delta: bool = False, diagonal: bool = False) -> None:
    """One forward and backward of a dense batch; a chunk size is that of a state, which is then returned."""
    shapes = [(K,), (K,), (V,), (K,) if diagonal else (), (LEVELS,)]
    dtypes = [dtype, dtype, dtype, torch.float32, torch.float32]
    q, k, v, log_decay, level_scales = (
        torch.zeros(1, TOKENS, 1, *shape, dtype=of, requires_grad=True)
        for shape, of in zip(shapes, dtypes, strict=True)
    )
    beta = torch.zeros(1, TOKENS, 1, requires_grad=True) if delta else None
    final = chunk_size > 0
    options = (None, None, None, 1.0, chunk_size, final, FENWICK.numbers)
    output, *_ = chunkwise(q, k, v, log_decay, beta, level_scales, *options)
    output.sum().backward()


def main(
    key_dim: Annotated[int, typer.Option(help="Width of a query or key.")] = 128,
    value_dim: Annotated[int, typer.Option(help="Width of a value.")] = 64,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    chunk_size: Annotated[int | None, typer.Option(help="Chunk size of a state.")] = None,
    delta: Annotated[bool, typer.Option("--delta", help="Compile the delta rule's kernels.")] = False,
    diagonal: Annotated[bool, typer.Option("--diagonal", help="Compile the diagonal gate's kernels.")] = False,
) -> None:
    """Print the registers, stack and shared memory of the default plans' kernels."""
    if dtype not in ("bfloat16", "float16", "float32"):
        raise typer.BadParameter(f"--dtype must be bfloat16, float16 or float32, got {dtype!r}")
    widest = widest_value(delta)
    if not (1 <= key_dim <= MAX_HEAD_DIM and 1 <= value_dim <= widest):
        got = f"{key_dim} and {value_dim}"
        raise typer.BadParameter(f"--key-dim must be 1 to {MAX_HEAD_DIM}, --value-dim to {widest}, got {got}")
    if chunk_size is not None and chunk_size not in CHUNK_SIZES:
        raise typer.BadParameter(f"--chunk-size must be one of {', '.join(map(str, CHUNK_SIZES))}, got {chunk_size}")
    kernels: dict[str, Any] = {}
    with progress_bar() as progress:
        task = progress.add_task("", total=None)
        with compiled_only(kernels, lambda name: announce(progress, task, name)):
            call(key_dim, value_dim, getattr(torch, dtype), chunk_size or 0, delta=delta, diagonal=diagonal)
    rows = []
    for name, kernel in kernels.items():
        given, metadata = constants(kernel), kernel.metadata
        tiles = " x ".join(str(given[tile]) for tile in ("TK", "BK", "BV", "E") if tile in given)
        registers, stack, shared = resources(kernel)
        options = f"{tiles}, {metadata.num_warps}, {metadata.num_stages}"
        rows.append(
            [name.split()[0], str(given.get("C", "")), options, *map(str, (registers, stack)), f"{shared / 1024:.0f}"]
        )
    columns = ["kernel", "chunk", "tiles, warps, stages", "registers", "stack", "shared KiB"]
    print_table(f"K {key_dim}, V {value_dim}, {dtype}, sm_90, triton {triton.__version__}", columns, rows)


if __name__ == "__main__":
    command_line(main, "resources")

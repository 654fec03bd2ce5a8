"""Cost of one token: a layer's step by partition, and whole models by context, compared with a key/value cache.

    python -m benchmarks.decode --device cuda --out results/decode-h100.json
    python -m benchmarks.decode --device cuda --no-models             # the layers alone, a minute
    python -m benchmarks.decode --out results/decode-cpu.json         # the demo's size, at 200 and at 20,000 tokens

GPU times are those of replayed CUDA graphs: one step of a model, or 64 steps of a layer. A layer runs over the 1,024
tokens up to its context, merges of blocks included; `step_bytes` gives the bytes that its steps must read and write.
Models are at a position where they read the most blocks, and sample greedily. A key/value cache does the least possible
work (`ContextLayer`).
"""

# N rows, B batch, T context, C chunk, M blocks, G groups, H heads, K key, V value, L levels
from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

from benchmarks.decoding_models import MODELS, build, cache_at
from benchmarks.machine import about, announce, check_options, command_line, keep, progress_bar
from loglinear.cli.console import print_table
from loglinear.models import LogLinearCache, LogLinearConfig, LogLinearForCausalLM
from loglinear.ops import (
    DecodeState,
    FenwickState,
    bucket_scores_step,
    log_linear_attention_step,
    log_linear_delta_rule_step,
)
from loglinear.ops.scores import zero_sums
from loglinear.partition import FENWICK, Partition
from loglinear.recipes import get_recipe

LAYERS = {  # G, H, K, V
    "scalar gate, the paper's Mamba-2": (1, 48, 128, 64),
    "delta rule, the paper's Gated DeltaNet": (6, 6, 192, 384),
}
LAYER_CONTEXT, LAYER_STEPS, CHUNK = 65_536, 1024, 64
PARTITIONS = (FENWICK, Partition(4, CHUNK), Partition(16, CHUNK))
ROUTED, FEW = PARTITIONS[-1], (2, 4, 8)  # numbers of `decode_top_k`
CONTEXTS, BATCHES = (1024, 16_384, 131_072), (1, 64)
MODEL_STEPS = 50


def step_bytes(position: int, state: FenwickState, top_k: int | None = None) -> int:
    """Return the bytes of one row's step: the blocks that it reads, its chunk, and at a chunk's end all blocks."""
    (M, H, K, V), G, delta = state.blocks.shape[1:], state.k.shape[2], state.beta is not None
    partition = state.partition or FENWICK
    place, chunks = position % CHUNK, position // CHUNK
    block = 4 * H * K * V

    def active(chunks: int) -> int:
        return sum(partition.has_block(chunks, number, M, CHUNK) for number in range(M))

    row = 4 * (G * K + H * V + H * (2 if delta else 1))
    chunk = (place + 1) * row + (4 * H * (place * place + CHUNK) if delta else 0)
    end = (active(chunks) + active(chunks + 1)) * block if place == CHUNK - 1 else 0
    read = active(chunks) if top_k is None else min(top_k, active(chunks))
    return read * block + chunk + end


def few_scales(state: FenwickState, L: int, position: int, top_k: int) -> torch.Tensor:
    """Return lambdas [N, H, L]: 0 but for the own block and `top_k` others that are there at this position."""
    (N, M, H), partition = state.blocks.shape[:3], state.partition or FENWICK
    numbers = [m for m in range(M) if partition.has_block(position // CHUNK, m, M, CHUNK)]
    columns = torch.tensor([partition.block_column(m, L, CHUNK) for m in numbers], device=state.k.device)
    chosen = columns[torch.rand(N, H, len(columns), device=columns.device).argsort(-1)[..., :top_k]]
    scales = torch.zeros(N, H, L, device=columns.device).scatter_(2, chosen, 1.0)
    scales[..., 0] = 1.0
    return scales


def copy_bandwidth() -> float:
    """Return the bytes a second that a copy of 1 GiB reads and writes, as the median of 20."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / statistics.median(times(lambda: y.copy_(x), 20)) * 1e3


def times(run: Callable[[], Any], runs: int) -> list[float]:
    """Return the milliseconds of each run. The runs are queued one after the other."""
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


def captured(run: Callable[[], Any], steps: int = 1) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of `steps` runs, after one run that warms up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(steps):
            run()
    return graph


def layer_row(name: str, partition: Partition, N: int, bandwidth: float, top_k: int | None = None) -> dict[str, Any]:
    """Return the time, the bytes and the share of the bandwidth of a layer's step with N rows that reads all blocks.

    With `top_k` each head reads only so many.
    """
    G, H, K, V = LAYERS[name]
    L, delta = partition.num_columns(LAYER_CONTEXT), name.startswith("delta")
    sizes = dict(num_levels=L, chunk_size=CHUNK, groups=G, heads=H, key_dim=K, value_dim=V, delta_rule=delta)
    state = FenwickState.zeros(N, device="cuda", partition=partition, **sizes)  # type: ignore[arg-type]
    state.blocks.normal_(std=0.1)
    decode, start = DecodeState.of(state), LAYER_CONTEXT - LAYER_STEPS
    q, k = (torch.randn(N, G, K, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v, gates = torch.randn(N, H, V, device="cuda", dtype=torch.bfloat16), torch.rand(2, N, H, device="cuda")
    scales = torch.rand(N, H, L, device="cuda") if top_k is None else few_scales(state, L, start, top_k)
    options: dict[str, Any] = dict(impl="triton", sparse=top_k is not None)

    def step() -> None:
        if delta:
            log_linear_delta_rule_step(q, k, v, -gates[0], gates[1], scales, decode, l2_normalize=True, **options)
        else:
            log_linear_attention_step(q, k, v, -gates[0], scales, decode, **options)

    seconds = seconds_of(step, decode)
    moved = N * sum(step_bytes(start + t, state, top_k) for t in range(LAYER_STEPS)) / LAYER_STEPS
    label = name if partition == FENWICK else f"{name}, radix {partition.radix}, blocks of {CHUNK}"
    return {
        "layer": label if top_k is None else f"{label}, {top_k} of them read",
        "N": N,
        "T": LAYER_CONTEXT,
        "us": seconds * 1e6,
        "mib_per_step": moved / 2**20,
        "bandwidth_share": moved / seconds / bandwidth,
    }


def seconds_of(step: Callable[[], Any], state: DecodeState) -> float:
    """Return the time of one of the `LAYER_STEPS` steps up to the context, from replayed graphs of 64."""
    graph = captured(step, CHUNK)
    state.fenwick.position.fill_(LAYER_CONTEXT - LAYER_STEPS - CHUNK)  # one replay warms up
    return sum(times(graph.replay, LAYER_STEPS // CHUNK)) / 1e3 / LAYER_STEPS


def scores_row(name: str, N: int, bandwidth: float) -> dict[str, Any]:
    """Return the row of the scores' step of a routed layer."""
    G, _, K, _ = LAYERS[name]
    L = ROUTED.num_columns(LAYER_CONTEXT)
    sums = zero_sums(N, num_columns=L, groups=G, key_dim=K, partition=ROUTED, device="cuda")
    decode = DecodeState.of(sums)
    q, k = (torch.randn(N, G, K, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = seconds_of(lambda: bucket_scores_step(q, k, decode, num_columns=L, impl="triton"), decode)
    start = LAYER_CONTEXT - LAYER_STEPS
    moved = N * sum(step_bytes(start + t, sums) for t in range(LAYER_STEPS)) / LAYER_STEPS
    return {
        "layer": f"scores of {name}, radix {ROUTED.radix}, blocks of {CHUNK}",
        "N": N,
        "T": LAYER_CONTEXT,
        "us": seconds * 1e6,
        "mib_per_step": moved / 2**20,
        "bandwidth_share": moved / seconds / bandwidth,
    }


@torch.no_grad()
def model_row(name: str, model: LogLinearForCausalLM, B: int, T: int, compiled: bool = False) -> dict[str, Any]:
    """Return the time and the memory of a model's step at batch B and context T."""
    row: dict[str, Any] = {"model": name + (", torch.compile" if compiled else ""), "B": B, "T": T}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    row["weights_gib"] = sum(p.nbytes for p in model.parameters()) / 2**30
    try:
        cache, token = cache_at(model, B, T, static=compiled), torch.zeros(B, 1, dtype=torch.long, device="cuda")
        forward = torch.compile(model, dynamic=False) if compiled else model

        def step() -> None:
            token.copy_(forward(token, past_key_values=cache).logits.argmax(-1))

        milliseconds = statistics.median(times(captured(step).replay, MODEL_STEPS))
        row |= {"ms": milliseconds, "tokens_per_second": B / milliseconds * 1e3, "cache_gib": cache.nbytes / 2**30}
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    except torch.cuda.OutOfMemoryError:
        row["failed"] = "out of memory"
    return row


def on_gpu(progress: Progress, keep: Callable[[list[dict[str, Any]]], None], models: bool) -> list[dict[str, Any]]:
    """Return the rows of all layers and, if `models`, of all models. `keep` is called after every model's row."""
    bandwidth = copy_bandwidth()
    rows: list[dict[str, Any]] = [{"copy_gb_per_second": bandwidth / 1e9}]
    reads = [(partition, None) for partition in PARTITIONS] + [(ROUTED, top_k) for top_k in FEW]
    task = progress.add_task("layers", total=len(LAYERS) * (len(reads) + 1) * len(BATCHES) + len(MODELS) * models)
    for name, N in itertools.product(LAYERS, BATCHES):
        for partition, top_k in reads:
            rows.append(layer_row(name, partition, N, bandwidth, top_k))
            progress.advance(task)
        rows.append(scores_row(name, N, bandwidth))
        progress.advance(task)
    keep(rows)
    for name in MODELS if models else ():
        announce(progress, task, name)
        model = build(name, "cuda", torch.bfloat16)
        for T in CONTEXTS:
            for B in BATCHES:
                rows.append(model_row(name, model, B, T))
                time = rows[-1].get("failed") or f"{rows[-1]['ms']:.2f} ms"
                progress.console.print(f"{name}, B {B}, T {T:,}: {time}", highlight=False)
                keep(rows)
        if not name.startswith("linear"):
            rows.append(model_row(name, model, 1, CONTEXTS[1], compiled=True))
            torch._dynamo.reset()
        progress.advance(task)
        del model
    return rows


@torch.no_grad()
def on_cpu(progress: Progress, steps: int, contexts: tuple[int, ...] = (200, 20_000)) -> list[dict[str, Any]]:
    """Return the step times of the demo's models and of a Transformer of the same size, float32, by prompt length."""
    demo = get_recipe("demo").model_config().to_dict()
    kinds: dict[str, dict[str, Any]] = {
        "log-linear Mamba-2": {},
        "log-linear Gated DeltaNet": {"variant": "gated_delta_net", "num_groups": 4},
        "Transformer": {"layer_types": ["full_attention"] * demo["num_hidden_layers"]},
    }
    models, caches = {}, {}
    milliseconds: dict[tuple[str, int], list[float]] = {}
    task = progress.add_task("prompts", total=len(kinds) * len(contexts))
    for name, changes in kinds.items():
        torch.manual_seed(0)
        models[name] = LogLinearForCausalLM(LogLinearConfig(**{**demo, **changes})).eval()
        for T in contexts:
            cache = caches[name, T] = LogLinearCache(models[name].config)
            ids = torch.randint(0, 256, (1, T), generator=torch.Generator().manual_seed(1))
            for piece in ids.split(4096, 1):
                models[name](piece, past_key_values=cache, logits_to_keep=1)
            milliseconds[name, T] = []
            progress.advance(task)
    token = torch.zeros(1, 1, dtype=torch.long)
    for number in progress.track(range(steps + 3), description="steps"):
        for key, cache in caches.items():  # in turn, so that a slow moment affects all of them
            start = time.perf_counter()
            models[key[0]](token, past_key_values=cache)
            if number >= 3:
                milliseconds[key].append((time.perf_counter() - start) * 1e3)
    return [
        {"model": name, "B": 1, "T": T, "ms": statistics.median(ms), "cache_mib": caches[name, T].nbytes / 2**20}
        for (name, T), ms in milliseconds.items()
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table of the layers, if there are any, and a table of the models."""
    layers = [row for row in rows if "layer" in row]
    if layers:
        columns = ["", "rows", "us", "MiB to move", "of a copy's bandwidth"]
        numbers = [[f"{r['us']:.1f}", f"{r['mib_per_step']:.1f}", f"{r['bandwidth_share']:.0%}"] for r in layers]
        named = [[row["layer"], str(row["N"]), *cells] for row, cells in zip(layers, numbers, strict=True)]
        print_table(f"Step of one layer at T {LAYER_CONTEXT:,}", columns, named)
    models = {(row["model"], row["B"], row["T"]): row for row in rows if "model" in row}
    if not models:
        return
    places = list(dict.fromkeys((B, T) for _, B, T in models))
    table = []
    for name in dict.fromkeys(name for name, _, _ in models):
        mine = [models.get((name, *place), {"failed": ""}) for place in places]
        table.append([name, *(row.get("failed", f"{row.get('ms', 0):.2f}") for row in mine)])
    print_table("Milliseconds a step by batch and context", ["", *(f"B {B}, T {T:,}" for B, T in places)], table)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    steps: Annotated[int, typer.Option(help="Timed steps on a CPU, of which the median counts.")] = 100,
    models: Annotated[bool, typer.Option(help="Time whole models too; a CPU times nothing else.")] = True,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    """Time the steps of decoding.

    cpu: models of the demo's size. cuda: one layer by partition, and the paper's models by context and batch.
    """
    if device == "cpu" and not models:
        raise typer.BadParameter("--no-models leaves nothing to time with --device cpu")
    check_options(device, out, steps=steps)
    described = about("decode", device)
    with progress_bar() as progress:
        rows = (
            on_gpu(progress, lambda rows: keep(out, described, rows), models)
            if device == "cuda"
            else on_cpu(progress, steps)
        )
    show(rows)
    keep(out, described, rows)


if __name__ == "__main__":
    command_line(main, "decode")

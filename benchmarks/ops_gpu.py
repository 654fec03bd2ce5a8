"""The GPU half of `benchmarks.ops`: log-linear attention and its peers in one run, forward and backward.

This project does not install the peers; every importable one is measured. The published runs found
flash-linear-attention and mamba-ssm with `PYTHONPATH=.peers/fla:.peers/mamba`. Every kernel of this library is compared
with float64 first.
"""

# B batch, T time, G groups, H heads, K key, V value, L levels
from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from benchmarks.machine import announce
from loglinear.cli.console import print_table
from loglinear.fenwick import num_levels
from loglinear.layers.routing import SHARPNESS
from loglinear.ops import bucket_scores, bucket_tokens, log_linear_attention, log_linear_delta_rule, routed_weights
from loglinear.partition import FENWICK, Partition

SECONDS = 0.25  # of device time for one number, with at least MIN_RUNS runs
MIN_RUNS = 5
PARTITIONS = (Partition(4, 64), Partition(8, 64), Partition(16, 64))  # beside radix 2
ROUTED = (Partition(2, 64), *PARTITIONS)
BF16_BUDGET = {False: 3.5e-3, True: 7e-3}  # of the scalar gate, of the delta rule
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class Shape:
    """Sizes of an operator's inputs, with the lengths to measure."""

    name: str
    B: int
    H: int
    G: int
    K: int
    V: int
    lengths: tuple[int, ...]
    with_peers: bool = True
    delta: bool = False
    routed: bool = False
    """The scores of buckets and the routed read, by radix and implementation, in the place of the operator."""
    diagonal: bool = False
    """A decay for each channel of the keys, in the implementation that impl="auto" chooses."""

    @property
    def impl(self) -> str:
        """The implementation that is measured."""
        return "auto" if self.diagonal else "triton"


SHAPES = [
    Shape("paper", 2, 48, 1, 128, 64, LENGTHS),
    Shape("one group per head", 2, 16, 16, 128, 128, (8192, 16384, 131072)),
    Shape("a million tokens", 1, 48, 1, 128, 64, (1 << 20,), with_peers=False),
    Shape("delta rule", 2, 16, 16, 128, 128, LENGTHS, delta=True),
    Shape("delta rule, the paper's heads", 2, 6, 6, 192, 384, LENGTHS, delta=True),
    Shape("delta rule, one sequence", 1, 8, 8, 128, 128, (131072,), delta=True),
    Shape("diagonal gate", 2, 16, 16, 128, 128, LENGTHS, with_peers=False, diagonal=True),
    Shape("diagonal delta rule", 2, 16, 16, 128, 128, LENGTHS, with_peers=False, delta=True, diagonal=True),
    Shape("routed", 1, 48, 1, 128, 64, (16384, 131072), routed=True),
    Shape("routed, one group per head", 1, 24, 24, 128, 64, (16384, 131072), routed=True),
    Shape("routed delta rule", 1, 24, 24, 128, 64, (16384, 131072), routed=True, delta=True),
]


def make_inputs(s: Shape, T: int, levels: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Return q, k, v, log_decay, level_scales as a Mamba-2 layer makes them: v = x dt, log_decay = A dt.

    A diagonal gate has a log_decay of mean -2.5 to each channel, uniform from -5 to 0.
    For the delta rule they are those of Gated DeltaNet: unit q and k, and beta between 0 and 1 before level_scales.
    """
    generator = torch.Generator("cuda").manual_seed(T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(s.B, T, *shape, generator=generator, device="cuda")

    dt = F.softplus(normal(s.H) - 4)
    A = -torch.exp(torch.rand(s.H, generator=generator, device="cuda") * 2)
    log_decay = A * dt
    if s.diagonal:
        log_decay = -5.0 * torch.rand(s.B, T, s.H, s.K, generator=generator, device="cuda")
    v = normal(s.H, s.V)
    if not s.delta:
        v.mul_(dt[..., None])
    scales = torch.empty(s.B, T, s.H, levels, dtype=dtype, device="cuda")
    for b in range(s.B):  # avoids a float32 copy of the whole tensor
        scales[b] = F.softplus(torch.randn(T, s.H, levels, generator=generator, device="cuda", dtype=dtype))
    if s.delta:
        q, k = (F.normalize(normal(s.G, s.K), dim=-1).to(dtype) for _ in range(2))
        return [q, k, v.to(dtype), log_decay, torch.sigmoid(normal(s.H)), scales]
    q, k = (normal(s.G, s.K) / s.K**0.5).to(dtype), normal(s.G, s.K).to(dtype)
    return [q, k, v.to(dtype), log_decay, scales]


def operator(s: Shape, impl: str, partition: Partition = FENWICK) -> Callable[..., Tensor]:
    """Return the operator of a shape as a function of its inputs."""
    function = log_linear_delta_rule if s.delta else log_linear_attention
    scale = s.K**-0.5 if s.delta else 1.0
    return lambda *leaves: function(*leaves, scale=scale, impl=impl, partition=partition).output


def candidates(s: Shape, T: int) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Return name -> (function of leaves, leaves). A peer that cannot be imported is left out."""
    if s.routed:
        return routed_candidates(s, T)
    inputs = make_inputs(s, T, num_levels(T))
    ours, scales = operator(s, s.impl), inputs[-1]
    peers: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "loglinear": (ours, inputs),
        "loglinear, L = 1": (ours, [*inputs[:-1], scales[..., :1].contiguous()]),
    }
    if not s.with_peers:
        return peers
    for partition in PARTITIONS:
        name = f"loglinear, radix {partition.radix}, blocks of {partition.finest_block}"
        columns = make_inputs(s, T, partition.num_columns(T))[-1]
        peers[name] = (operator(s, "triton", partition), [*inputs[:-1], columns])
    if s.delta:
        return peers | delta_rule_peers(inputs)
    q, k, v, log_decay, scales = inputs
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        A = -torch.ones(s.H, device="cuda")
        peers["mamba-ssm SSD (linear)"] = (
            lambda x, dt, B, C: mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256),
            [v, -log_decay, k, q],
        )
    except ImportError as error:
        print("mamba-ssm is left out:", error)
    if s.G == 1:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        attention = [torch.randn(s.B, h, T, s.V, device="cuda", dtype=torch.bfloat16) for h in (s.H, 1, 1)]
        peers["FlashAttention-2"] = (flash, attention)
        try:
            from fla.ops.log_linear_attn import chunk_log_linear_attn

            def fla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scales: Tensor) -> Tensor:
                return chunk_log_linear_attn(q, k, v, g, scales)[0]

            peers["fla log-linear"] = (fla, inputs)
        except ImportError as error:
            print("fla is left out:", error)
    return peers


def routed_candidates(s: Shape, T: int) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Return the scores, and the read with them (scores, weights, operator), by both implementations of the scores.

    The operator alone, with the same columns, is in between. All operators are kernels. The weights come from eager
    torch operators, compiled ones, or kernels, which models take. The kernels' weights are also measured alone.
    """
    found: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {}
    for p in ROUTED:
        inputs = make_inputs(s, T, p.num_columns(T))
        name = f"radix {p.radix}"
        found[f"loglinear, {name}: operator"] = operator(s, "triton", p), inputs
        for impl, owner in (("triton", "loglinear"), ("torch", "scores in torch")):
            found[f"{owner}, {name}: scores"] = partial(scores, p, inputs[-1].shape[3], impl), inputs[:2]
            found[f"{owner}, {name}: routed read"] = partial(routed_read, s, p, impl, weights), inputs
        for kind, weigh in (("compiled", compiled_weights), ("kernel", kernel_weights)):
            read = partial(routed_read, s, p, "triton", weigh)
            found[f"loglinear, {name}: routed read, {kind} weights"] = read, inputs
        found[f"loglinear, {name}: kernel weights"] = weights_alone(p, inputs)
    return found


def weights_alone(p: Partition, inputs: list[Tensor]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return the kernels' weights as a function of logits and scores, and these: q, k, ..., logits are the inputs."""
    q, k, *_, logits = inputs
    T, L = logits.shape[1], logits.shape[3]
    tokens = bucket_tokens(torch.arange(T, device=q.device)[None], num_columns=L, partition=p)
    leaves = [logits, scores(p, L, "auto", q, k)]
    return lambda logits, found: kernel_weights(logits, found, tokens), leaves


def scores(p: Partition, num_columns: int, impl: str, q: Tensor, k: Tensor) -> Tensor:
    """Return the scores of buckets."""
    return bucket_scores(q, k, num_columns=num_columns, partition=p, impl=impl).scores


def weights(logits: Tensor, found: Tensor, tokens: Tensor, impl: str = "torch") -> Tensor:
    """Return the weights of the buckets, with tau = 1."""
    tau = logits.new_ones(logits.shape[2], dtype=torch.float32)
    return routed_weights(logits, found, tokens, tau, sharpness=SHARPNESS, impl=impl)


compiled_weights = torch.compile(weights)
kernel_weights = partial(weights, impl="triton")


def routed_read(s: Shape, p: Partition, impl: str, weigh: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
    """Return the output of the routed read, with the last of `leaves` as logits."""
    *rest, logits = leaves
    found = bucket_scores(*rest[:2], num_columns=logits.shape[3], partition=p, impl=impl)
    return operator(s, "triton", p)(*rest, weigh(logits, found.scores, found.tokens))


def delta_rule_peers(inputs: list[Tensor]) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Return fla's linear Gated DeltaNet.

    Its backward refuses Triton 3.4 to 3.7.0 on Hopper, where it is wrong. Here it runs all the same, only for its time.
    """
    try:
        import fla.ops.common.chunk_o as stages
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        print("fla is left out:", error)
        return {}
    stages.TRITON_ABOVE_3_7_1 = True
    q, k, v, log_decay, beta, _ = inputs
    leaves = [q, k, v, log_decay, beta.to(q.dtype)]
    return {"fla Gated DeltaNet (linear)": (lambda *leaves: chunk_gated_delta_rule(*leaves)[0], leaves)}


def median_ms(run: Callable[[], Any]) -> float:
    """Return the median of single runs between device events.

    Runs are queued one after the other, so the CPU's time for launches counts only if the device waits for it.
    """
    run()
    torch.cuda.synchronize()
    clock = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    clock[0].record()
    run()
    clock[1].record()
    torch.cuda.synchronize()
    once = clock[0].elapsed_time(clock[1])
    runs = int(min(200, max(2 if once > 500 else MIN_RUNS, SECONDS * 1e3 / once)))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def figures(function: Callable[..., Tensor], leaves: list[Tensor], graph: bool) -> dict[str, float]:
    """Return milliseconds and peak memory beyond the inputs, with `graph` also the times of a replayed CUDA graph."""
    with torch.no_grad():
        forward = median_ms(lambda: function(*leaves))
    leaves = [x.detach().requires_grad_() for x in leaves]
    weight = torch.randn_like(function(*leaves))

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves), leaves, weight)

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = torch.cuda.max_memory_allocated() - before
    figures = {"forward": forward, "forward+backward": median_ms(both), "peak_gib": peak / 2**30}
    if graph:
        for name, run in (("forward, graph", lambda: function(*leaves)), ("forward+backward, graph", both)):
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                run()
            figures[name] = median_ms(captured.replay)
    return figures


def check(s: Shape) -> float:
    """Return ||output - float64|| / ||float64|| at T 2,048 with at most four heads and groups. Exits if it is large.

    With `routed` the outputs are the scores and the weights, and the larger error counts.
    """
    few = Shape(s.name, 1, min(4, s.H), min(4, s.G), s.K, s.V, (), delta=s.delta, routed=s.routed, diagonal=s.diagonal)
    inputs = make_inputs(few, 2048, 12)
    kernels, torch_ = operator(s, s.impl), operator(s, "torch")
    if s.routed:
        inputs = inputs[:2]
        kernels, torch_ = (partial(scores, ROUTED[1], 12, impl) for impl in ("triton", "torch"))
    pairs = [(kernels(*inputs), torch_(*(x.double() for x in inputs)))]
    if s.routed:
        weigh, leaves = weights_alone(ROUTED[1], make_inputs(few, 2048, 12))
        tokens = bucket_tokens(torch.arange(2048, device="cuda")[None], num_columns=12, partition=ROUTED[1])
        logits, found = leaves
        pairs.append((weigh(*leaves), weights(logits.double(), found.double(), tokens)))
    error = max(float((actual.double() - exact).norm() / exact.norm()) for actual, exact in pairs)
    if not error < BF16_BUDGET[s.delta]:
        raise SystemExit(f"{s.name} is wrong: relative error {error:.1e}; nothing was timed")
    return error


def measure(
    shapes: list[Shape],
    lengths: list[int] | None,
    progress: Progress,
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Return a row for each shape and length, in the order of `lengths` if given. `keep` is called after each one."""
    rows: list[dict[str, Any]] = []
    for s in shapes:
        error = check(s)
        for T in (T for T in lengths or s.lengths if T in s.lengths):
            row: dict[str, Any] = {"shape": s.name, "T": T, "error": error, "figures": {}}
            rows.append(row)
            task = progress.add_task(f"{s.name}, T {T}", total=None)
            for name, (function, leaves) in candidates(s, T).items():
                announce(progress, task, f"{s.name}, T {T:,}, {name}")
                try:
                    row["figures"][name] = figures(
                        function,
                        leaves,
                        graph=(s.routed or T == 2048) and not s.diagonal and name.startswith("loglinear"),
                    )
                except Exception as failure:  # a peer that cannot run this shape is part of the result
                    if name.startswith("loglinear"):
                        raise
                    row["figures"][name] = {"failed": f"{type(failure).__name__}: {str(failure)[:200]}"}
                text = cell(row["figures"][name])
                progress.console.print(f"{s.name}, T {T:,}, {name}: {text}", highlight=False)
                keep(rows)
                torch.cuda.empty_cache()
            progress.remove_task(task)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table for each shape."""
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = [row for row in rows if row["shape"] == shape]
        names = dict.fromkeys(name for row in mine for name in row["figures"])
        cells = [[name, *(cell(row["figures"].get(name)) for row in mine)] for name in names]
        title = f"{shape}: ms forward / forward+backward, GiB (error {mine[0]['error']:.1e})"
        print_table(title, ["", *(f"T {row['T']:,}" for row in mine)], cells)


def cell(figures: dict[str, Any] | None) -> str:
    """Return the numbers of one candidate at one length."""
    if figures is None:
        return ""
    if "failed" in figures:
        return "cannot"
    text = f"{figures['forward']:.2f} / {figures['forward+backward']:.2f}, {figures['peak_gib']:.1f}"
    if "forward, graph" in figures:
        text += f" (graph {figures['forward, graph']:.2f} / {figures['forward+backward, graph']:.2f})"
    return text

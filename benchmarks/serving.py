"""Tokens a second and waiting times of the server by the number of clients, and the cost of a repeated prompt.

    OMP_NUM_THREADS=1 python -m benchmarks.serving --rounds 5 --tokens 48 --out results/serving-cpu.json
    python -m benchmarks.serving --device cuda --recipe paper_mamba2 --slots 64 --out results/serving-gpu.json

The server runs in this process, with random weights that never end a text. Each client sends one greedy request after
the other over HTTP, and reads its answer as a stream. `rows` are requests as rows of one batch. `turns` are requests
one after the other, which is the server with --slots 0. Both are measured in every round, so a slow moment affects
both. Ratios are those of one round. The medians of the rounds count.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from transformers.utils import logging

from benchmarks.machine import about, announce, check_options, command_line, keep, progress_bar
from loglinear.cli.console import print_table
from loglinear.cli.serve import engine_of, prepare
from loglinear.models import ByteTokenizer, LogLinearForCausalLM
from loglinear.recipes import get_recipe

KINDS = ("rows", "turns")
LETTERS = "abcdefghijklmnopqrstuvwxyz "
LONG_PROMPT = 8000  # bytes of the prompt that is repeated
PREFIX_CACHE = 256  # MiB
FEWEST = 8  # requests of a measurement


class Load(NamedTuple):
    """The requests of one measurement."""

    clients: int
    requests: int  # of each client
    prompt: int  # random letters
    tokens: int  # of each answer


@torch.no_grad()
def build(recipe: str, device: str) -> LogLinearForCausalLM:
    """Return a recipe's model with random weights that writes letters and never ends a text."""
    torch.manual_seed(0)
    model = LogLinearForCausalLM(get_recipe(recipe).model_config()).eval()
    others = torch.ones(model.config.vocab_size, dtype=torch.bool)
    others[list(LETTERS.encode())] = False
    model.lm_head.weight[others] = 0.0  # some letter has a logit above 0
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)


@contextlib.contextmanager
def served(model: LogLinearForCausalLM, slots: int) -> Iterator[int]:
    """Serve a model as `loglinear serve` does, in a thread, and give its port."""
    import uvicorn

    from loglinear.cli.serving.app import application
    from loglinear.cli.serving.turns import Limits

    tokenizer = ByteTokenizer()
    prepare(model, tokenizer)
    app = application(
        "benchmark",
        model,
        tokenizer,
        Limits(tokens=4096, prompt_tokens=65_536, seconds=600.0),
        engine_of(model, slots, PREFIX_CACHE),
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def text(size: int, seed: int) -> str:
    """Return random letters."""
    return "".join(random.Random(seed).choices(LETTERS, k=size))


def ask(port: int, prompt: str, tokens: int, **fields: Any) -> tuple[float, float, int]:
    """Stream one answer, and return the seconds to its first text, to its end, and its number of tokens.

    `fields` are further fields of the request.
    """
    began, first, last = time.perf_counter(), None, b""
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    body = json.dumps({"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, **fields})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    while line := response.readline():
        if line.strip() and b"[DONE]" not in line:
            first, last = first or time.perf_counter() - began, line
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"the server answers {response.status}: {last.decode()}")
    usage = json.loads(last.removeprefix(b"data: "))["usage"]
    return first or 0.0, time.perf_counter() - began, usage["completion_tokens"]


def measure(port: int, load: Load, round_: int, **fields: Any) -> dict[str, float]:
    """Return the tokens a second of all clients together, and the median and the longest waiting times.

    `fields` are further fields of every request.
    """

    def client(number: int) -> list[tuple[float, float, int]]:
        seeds = [(round_ * 1000 + number) * 1000 + request for request in range(load.requests)]
        return [ask(port, text(load.prompt, seed), load.tokens, **fields) for seed in seeds]

    began = time.perf_counter()
    with ThreadPoolExecutor(load.clients) as pool:
        answers = [answer for answers in pool.map(client, range(load.clients)) for answer in answers]
    seconds = time.perf_counter() - began
    firsts, ends, tokens = zip(*answers, strict=True)
    return {
        "tokens_per_second": sum(tokens) / seconds,
        "first_seconds": statistics.median(firsts),
        "first_seconds_most": max(firsts),
        "answer_seconds": statistics.median(ends),
    }


def repeated(port: int, round_: int) -> dict[str, float]:
    """Return the seconds to the first text of a long prompt, of the same prompt again, and of a prompt of a byte."""
    prompt = text(LONG_PROMPT, round_)
    return {name: ask(port, asked, 2)[0] for name, asked in (("new", prompt), ("again", prompt), ("short", "a"))}


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of every column."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table of the clients and a table of the repeated prompt."""
    by_clients = [row for row in rows if "clients" in row]
    table = [
        [
            row["kind"],
            str(row["clients"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['of_fewest']:.1f}",
            f"{row['first_seconds']:.2f}, {row['first_seconds_most']:.2f}",
            f"{row['answer_seconds']:.2f}",
        ]
        for row in by_clients
    ]
    heads = ["", "clients", "tokens/s", "of the fewest clients'", "first text, most (s)", "answer (s)"]
    print_table("The server by clients", heads, table)
    seconds = [
        [row["kind"], *(f"{row[name] * 1e3:.0f}" for name in ("new", "again", "short"))] for row in rows if "new" in row
    ]
    print_table(
        f"Milliseconds to the first text of a prompt of {LONG_PROMPT:,} bytes",
        ["", "new", "again", "of one byte"],
        seconds,
    )


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    recipe: Annotated[str, typer.Option(help="Recipe whose model is served, with random weights.")] = "demo",
    clients: Annotated[list[int] | None, typer.Option(help="Numbers of clients; repeatable. 1, 4, 16, 64.")] = None,
    requests: Annotated[int, typer.Option(help="Requests of each client; few clients send at least 8 together.")] = 2,
    prompt: Annotated[int, typer.Option(help="Bytes of each prompt.")] = 64,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    slots: Annotated[int, typer.Option(help="Rows of the server.")] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds, of which the median counts.")] = 3,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    """Time the server with many clients, as rows of one batch and in turns."""
    numbers = sorted(set(clients or [1, 4, 16, 64]))
    counts = dict(requests=requests, prompt=prompt, tokens=tokens, slots=slots, rounds=rounds)
    check_options(device, out, clients=numbers, **counts)
    logging.set_verbosity_error()
    load_before = os.getloadavg()[0]
    described = about("serving", device) | {"recipe": recipe, **counts, "load_before": load_before}
    model = build(recipe, device)
    loads = [Load(number, max(requests, -(-FEWEST // number)), prompt, tokens) for number in numbers]
    found: dict[Any, list[dict[str, float]]] = {}
    with progress_bar() as progress, served(model, slots) as rows_port, served(model, 0) as turns_port:
        ports = dict(zip(KINDS, (rows_port, turns_port), strict=True))
        task = progress.add_task("warm up", total=rounds * len(KINDS) * (len(loads) + 1))
        for port in ports.values():
            measure(port, Load(min(slots, 4), 1, 8, 8), rounds)
        for round_ in range(rounds):
            for load in loads:
                for kind, port in ports.items():
                    announce(progress, task, f"round {round_ + 1}, {load.clients} clients, {kind}")
                    measured = found.setdefault((kind, load), [])
                    measured.append(measure(port, load, round_))
                    fewest = found[kind, loads[0]][-1]["tokens_per_second"]  # of the same round
                    measured[-1]["of_fewest"] = measured[-1]["tokens_per_second"] / fewest
                    progress.advance(task)
            for kind, port in ports.items():
                found.setdefault((kind, None), []).append(repeated(port, round_))
                progress.advance(task)
            rows = [
                {"kind": kind, **({} if load is None else load._asdict()), **medians(values)}
                for (kind, load), values in found.items()
            ]
            keep(out, described, rows)
    show(rows)


if __name__ == "__main__":
    command_line(main, "serving")

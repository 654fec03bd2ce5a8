"""Thousands of ways to ask a server wrongly: it answers, or refuses in one line, and goes on serving."""

import json
import os
import random
import socket
import time
from collections import Counter

import pytest

from loglinear.evaluation import sample
from loglinear.training import ByteTokenizer
from tests.cli.server import LIMITS, NAME, ask, refusal, served, tiny_model

CASES = 500 * int(os.environ.get("SOAK", "1"))
EVERY = 10  # cases between two probes
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
TEXTS = [
    "",
    "a",
    "line 1",
    "\0",
    "日本 😀",
    "\u202e\u2028",
    "<eos><pad>",
    "%s{}{{",
    "a" * 2900,
    "é" * 4000,
    "\\ud800",
    "\r\n\r\n",
]
NUMBERS = [0, -1, 1, 2, 7, 2**31, 2**63, 2**64, 10**30, -(10**30), 1.5, 1e-320, 1e308, float("nan"), float("inf")]
FIELDS = [
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "logit_bias",
    "generation_config",
    "user",
    "n",
    "best_of",
    "echo",
    "logprobs",
    "top_logprobs",
    "suffix",
    "frequency_penalty",
    "presence_penalty",
    "tools",
    "tool_choice",
    "functions",
    "response_format",
    "modalities",
    "audio",
    "store",
    "metadata",
    "num_beams",
    "max_time",
    "min_length",
    "__class__",
]


def value(rng, depth=0):
    """Any JSON value."""
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind == 5:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {rng.choice([*FIELDS, *TEXTS[:6], "role", "content", "5"]): value(rng, depth + 1) for _ in range(3)}
    return rng.choice([TEXTS, NUMBERS, [True, False, None], ["user", "auto", "inf", "10"], NUMBERS][kind])


def request(rng):
    """A request that is right, and perhaps changed in one to three fields."""
    path = rng.choice([COMPLETIONS, CHATS])
    text = rng.choice(TEXTS)
    body = {"prompt": text} if path == COMPLETIONS else {"messages": [{"role": "user", "content": text}]}
    body |= {"max_tokens": rng.choice([1, 3, 8]), "stream": rng.random() < 0.4, "seed": rng.randrange(9)}
    body |= rng.choice([{}, {"temperature": 0}, {"top_p": 0.5}, {"stop": ["a", "日"]}, {"logit_bias": {"97": 50}}])
    for _ in range(rng.choice([0, 0, 1, 2])):
        body[rng.choice(FIELDS)] = value(rng)
    return path, body


def check_answer(body, answer):
    """The answer is whole and within what was asked."""
    data = answer.decode()
    if body.get("stream"):
        *_, last, done = data.removesuffix("\n\n").split("\n\n")
        last = json.loads(last.removeprefix("data: "))
        assert done == "data: [DONE]" and all(line.startswith("data: ") for line in data.split("\n") if line)
    else:
        last = json.loads(data)
        choice = last["choices"][0]
        assert isinstance(choice["text"] if "text" in choice else choice["message"]["content"], str)
    assert last["choices"][0]["finish_reason"] in ("stop", "length") and "error" not in last
    flags = json.loads(body.get("generation_config") or "{}")
    asked = body.get("max_tokens") or body.get("max_completion_tokens") or flags.get("max_new_tokens") or 1024
    assert last["usage"]["completion_tokens"] <= asked <= LIMITS.tokens and last["model"] == NAME


def fields(rng, port):
    path, body = request(rng)
    status, answer = ask(port, path, body)
    if status == 200:
        check_answer(body, answer)
        return "answered"
    refusal((status, answer))
    return "refused"


def bytes_that_are_no_request(rng, port):
    path, body = request(rng)
    data = bytearray(json.dumps(body).encode())
    kind = rng.randrange(5)
    if kind == 0:
        data = data[: rng.randrange(len(data))]
    elif kind == 1:
        data[rng.randrange(len(data))] = rng.randrange(128, 256)  # no letter of JSON, so nothing that is right
    elif kind == 2:
        data = rng.choice([b"[", b'{"a":', b"[{"]) * rng.choice([300, 10_000])
    elif kind == 3:
        data = rng.randbytes(rng.choice([1, 50, 5000]))
    else:
        data = b" " * rng.choice([200_000, 2_000_000])
    refusal(ask(port, path, bytes(data)))
    return "refused"


def place(rng, port):
    path = rng.choice(
        ["/", "/v1", "/reset", "/docs", "/openapi.json", "/v1/responses", "/../etc/passwd", "/%00", COMPLETIONS]
    )
    method = rng.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"])
    refusal(ask(port, path, method=method))
    return "refused"


def raw(rng, port):
    """Bytes that are no HTTP at all: they are answered with 4xx, or the connection is closed."""
    lines = [rng.randbytes(60), b"GET / HTTP/9.9", b"POST " + b"a" * 100_000, b"\x16\x03\x01", b"Content-Length: -1"]
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        try:
            client.sendall(rng.choice(lines) + b"\r\n\r\n")
            client.shutdown(socket.SHUT_WR)
            answer = client.recv(1000)
        except ConnectionError:
            answer = b""
    assert not answer or answer.startswith(b"HTTP/1.1 4")
    return "refused"


def leave(rng, port):
    """A client that goes: within its request, before its answer, or within a stream."""
    body = {"prompt": "ab", "max_tokens": LIMITS.tokens, "stream": rng.random() < 0.5, "logit_bias": {"257": -100}}
    data = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    whole = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(whole[: rng.choice([20, len(whole) - 5, len(whole), len(whole)])])
        if rng.random() < 0.5:
            time.sleep(rng.choice([0.0, 0.02]))
    return "left"


CASE_KINDS = [fields] * 12 + [bytes_that_are_no_request] * 3 + [place] * 2 + [raw] + [leave] * 2


def test_a_server_outlives_its_clients(record_property, capfd):
    rng = random.Random("requests")
    model = tiny_model()
    prompts = {
        text: sample(model, ByteTokenizer(), text, max_new_tokens=6, temperature=0).text for text in ("ab", "é\n")
    }
    counts, slowest = Counter(), 0.0
    with served(model) as port:
        for number in range(CASES):
            case = rng.choice(CASE_KINDS)
            try:
                counts[case(rng, port)] += 1
            except (AssertionError, OSError, ValueError) as error:
                pytest.fail(f"case {number}, {case.__name__}: {error!r}")
            if number % EVERY == 0:
                prompt, expected = rng.choice(list(prompts.items()))
                began = time.monotonic()
                status, body = ask(port, COMPLETIONS, {"prompt": prompt, "max_tokens": 6, "temperature": 0})
                slowest = max(slowest, time.monotonic() - began)
                assert status == 200 and prompt + json.loads(body)["choices"][0]["text"] == expected
                counts["probed"] += 1
    assert slowest < 5 and "Traceback" not in capfd.readouterr().err
    assert counts["answered"] > CASES // 20 and counts["refused"] > CASES // 4
    record_property(
        "soak",
        f"{CASES} requests to a server: {counts['answered']} answered, {counts['refused']} refused in one line, "
        f"{counts['left']} left; {counts['probed']} probes right, the slowest in {slowest:.1f} s",
    )

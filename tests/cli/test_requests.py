"""Requests to the server: what is refused and how, what bounds an answer, and clients that leave."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPConnection

import pytest
import torch

from loglinear.cli.options import LARGEST
from loglinear.cli.serve import engine_of
from loglinear.cli.serving.requests import CompletionRequest, Refused, parse
from loglinear.cli.serving.turns import Limits, Turn, TurnEnded
from loglinear.evaluation import sample
from loglinear.models import LogLinearForCausalLM
from loglinear.training import ByteTokenizer
from tests.cli.command_line import in_process
from tests.cli.server import LIMITS, NAME, ask, complete, refusal, served
from tests.models.tiny_models import ROUTED, tiny_config

ENDLESS = {"max_tokens": 10**6, "logit_bias": {str(ByteTokenizer().eos_token_id): -100}}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


def text_of(answer):
    assert answer[0] == 200, answer
    return json.loads(answer[1])["choices"][0]["text"]


def continued(model, prompt, tokens):
    result = sample(model, ByteTokenizer(), prompt, max_new_tokens=tokens, temperature=0)
    return result.text.removeprefix(prompt)


FIELDS = [
    ({"n": 2}, "n must be 1, as no other value is supported, got 2"),
    ({"best_of": 2}, "best_of must be 1"),
    ({"echo": True}, "echo must be False"),
    ({"logprobs": 0}, "logprobs must be False"),
    ({"suffix": "end"}, "suffix must be ''"),
    ({"presence_penalty": 0.5}, "presence_penalty must be 0"),
    ({"frequency_penalty": 0.5}, "frequency_penalty must be 0"),
    ({"tools": []}, "tools is not supported"),
    ({"a\nb": 1}, "'a\\nb' is not supported"),
    ({"model": "other"}, f"there is no model 'other', only '{NAME}'"),
    ({"max_tokens": 10**30}, f"max_tokens must be at most {LIMITS.tokens} on this server, got 1{'0' * 30}"),
    ({"max_tokens": 0}, "max_tokens should be greater than or equal to 1, got 0"),
    ({"max_tokens": "5"}, "max_tokens should be a valid integer, got '5'"),
    ({"max_tokens": True}, "max_tokens should be a valid integer, got True"),
    ({"temperature": float("inf")}, "temperature should be a finite number, got inf"),
    ({"temperature": -0.1}, "temperature should be greater than or equal to 0"),
    ({"temperature": 100.1}, "temperature should be less than or equal to 100, got 100.1"),
    ({"top_p": 1.5}, "top_p should be less than or equal to 1"),
    ({"top_p": 0}, "top_p should be greater than 0, got 0"),
    ({"generation_config": '{"top_p": 0.0}'}, "generation_config.top_p should be greater than 0, got 0.0"),
    ({"generation_config": '{"top_k": -1}'}, "generation_config.top_k should be greater than or equal to 0"),
    ({"seed": 2**63}, "seed should be less than or equal to 9223372036854775807"),
    ({"stop": ""}, "stop.0 string should have at least 1 character"),
    ({"stop": ["a"] * 5}, "stop list should have at most 4 items"),
    ({"logit_bias": {"264": 1}}, "logit_bias must have tokens 0 to 263, got '264'"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5 should be less than or equal to 100"),
    ({"generation_config": '{"num_beams": 4}'}, "generation_config.num_beams is not supported"),
    ({"generation_config": '{"max_new_tokens": 2}'}, "max_tokens and generation_config.max_new_tokens exclude each"),
    ({"generation_config": '{"top_p": 0.5}', "top_p": 0.5}, "top_p and generation_config.top_p exclude each other"),
    ({"generation_config": '{"max_new_tokens": 2001}', "max_tokens": None}, "generation_config.max_new_tokens must be"),
    ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation is not supported"),
    ({"prompt": ["a"]}, "prompt should be a valid string, got ['a']"),
    ({"prompt": "a" * LIMITS.prompt_tokens}, "the prompt has 3,001 tokens, and this server takes at most 3,000"),
]
BODIES = [
    (b"", "the body is not JSON"),
    (b"[" * 10_000, "the body is not JSON: recursion limit exceeded"),
    (b'{"prompt": "\xff"}', "the body is not JSON"),
    (b"[1]", "the body must be a JSON object, got [1]"),
    (b'{"max_tokens": NaN}', "max_tokens should be a valid integer, got nan"),
    (b'{"max_tokens": ' + b"9" * 5000 + b"}", "the body is not JSON: number out of range"),
    (b" " * 200_000, "the body has 200,000 bytes, and this server takes at most 113,536"),
]
MESSAGES = [
    (None, "messages is missing"),
    ([], "messages list should have at least 1 item"),
    ([{"role": "user"}], "messages.0.content is missing"),
    ([{"role": "wizard", "content": "a"}], "messages.0.role should be 'system', 'developer', 'user' or 'assistant'"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content should be a valid string"),
    ([{"role": "user", "content": "a", "name": "me"}], "messages.0.name is not supported"),
]


@pytest.mark.parametrize(("fields", "message"), FIELDS, ids=[str(list(fields)) for fields, _ in FIELDS])
def test_a_field_that_cannot_be_honoured_is_refused_in_one_line(port, fields, message):
    assert refusal(complete(port, **{"prompt": "a", "max_tokens": 1, **fields})).startswith(message)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (-1e-9, 0.0, 2.0, 2.1, 100.0, 100.1)),
        ("top_p", (-0.1, 0.0, 1e-9, 1.0, 1.1)),
        ("top_k", (-1, 0, 1, LARGEST, LARGEST + 1)),
    ],
)
def test_a_sampling_field_has_the_range_of_the_command_line(capsys, name, values):
    for value in values:
        body = {"generation_config": json.dumps({name: value})}
        try:
            parse(CompletionRequest, json.dumps(body).encode())
            is_taken = True
        except Refused:
            is_taken = False
        option = f"--{name.replace('_', '-')}"
        line = in_process(capsys, "generate", "--model", "/nowhere", "--prompt", "a", option, value)[2]
        assert (f"'{option}': must" not in line) == is_taken, (value, line)


@pytest.mark.parametrize(("body", "message"), BODIES, ids=[ascii(body[:10]) for body, _ in BODIES])
def test_a_body_that_is_none_is_refused_in_one_line(port, body, message):
    assert refusal(ask(port, COMPLETIONS, body)).startswith(message)


@pytest.mark.parametrize(("messages", "message"), MESSAGES, ids=[str(messages) for messages, _ in MESSAGES])
def test_messages_that_are_none_are_refused_in_one_line(port, messages, message):
    assert refusal(ask(port, CHATS, {"messages": messages, "max_tokens": 1})).startswith(message)


def test_places_and_types_that_are_none_are_refused_in_one_line(port):
    for method, path in (("GET", "/"), ("POST", "/reset"), ("GET", COMPLETIONS), ("POST", "/health")):
        assert path in refusal(ask(port, path, b"{}" if method == "POST" else None, method=method))
    typed = ask(port, COMPLETIONS, b"{}", headers={"Content-Type": "text/plain"})
    assert refusal(typed) == "the content type must be application/json, got 'text/plain'"
    assert refusal(ask(port, "/load_model", {"model": "other"})).startswith("there is no model 'other'")


def test_values_that_ask_for_nothing_are_taken(port, model):
    nothing = dict(n=1, best_of=1, echo=False, frequency_penalty=0.0, presence_penalty=0, logit_bias={}, suffix=None)
    nothing |= dict(logprobs=None, user="me", stop=None, stream=False, model=NAME)
    answer = complete(port, prompt="ab", max_tokens=8, temperature=1e-9, **nothing)
    assert text_of(answer) == continued(model, "ab", 8) and json.loads(answer[1])["model"] == NAME


def test_a_chat_of_transformers_command_line(port, model):
    """`transformers chat` sends its settings so."""
    flags = {"max_new_tokens": 6, "do_sample": False, "transformers_version": "5.0.0", "top_k": None}
    asked = {"messages": [{"role": "user", "content": "ab"}], "generation_config": json.dumps(flags)}
    status, body = ask(port, CHATS, asked)
    assert status == 200 and json.loads(body)["choices"][0]["message"]["content"] == continued(model, "ab", 6)
    assert b'"status": "ready"' in ask(port, "/load_model", {"model": NAME})[1]


def test_logit_bias_counts_in_completions_too(port):
    answer = complete(port, prompt="ab", max_tokens=5, temperature=0, logit_bias={str(ord("q")): 100})
    assert text_of(answer) == "qqqqq"


def test_stop_strings_of_several_bytes_end_an_answer(port):
    bias = {str(byte): 100 for byte in "é".encode()}
    answer = complete(port, prompt="ab", max_tokens=1000, temperature=0, seed=0, logit_bias=bias, stop=["éé", "\xa9é"])
    assert answer[0] == 200
    text = complete(port, prompt="ab", max_tokens=200, seed=3, logit_bias=bias, stop="é")
    assert text_of(text).endswith("é") and json.loads(text[1])["choices"][0]["finish_reason"] == "stop"


def test_a_seed_counts_while_others_sample(port):
    alone = text_of(complete(port, prompt="ab", max_tokens=40, seed=5))
    found = []
    asked = [dict(seed=5), *[dict(seed=number) for number in range(3)], dict(seed=5)]
    threads = [
        threading.Thread(
            target=lambda more=more: found.append((more, text_of(complete(port, prompt="ab", max_tokens=40, **more))))
        )
        for more in asked
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [text for more, text in found if more == dict(seed=5)] == [alone, alone]
    assert len({text for _, text in found}) == 4


def test_an_answer_without_a_seed_is_another_each_time(port):
    texts = []
    for _ in range(2):
        complete(port, prompt="ab", max_tokens=1, seed=7)
        texts.append(text_of(complete(port, prompt="ab", max_tokens=40)))
    assert texts[0] != texts[1]


@pytest.mark.parametrize("stream", [False, True])
def test_time_ends_an_answer_which_says_that_it_is_cut(model, slots, stream):
    with served(model, Limits(tokens=10**6, prompt_tokens=100, seconds=0.3), slots) as port:
        began = time.monotonic()
        status, body = complete(port, prompt="ab", temperature=0, stream=stream, **ENDLESS)
        assert status == 200 and time.monotonic() - began < 10
        last = json.loads(body.decode().removesuffix("\n\ndata: [DONE]\n\n").split("\n")[-1].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length" and 0 < last["usage"]["completion_tokens"] < 10**6


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_does_not_hold_the_next(model, slots, stream):
    with served(model, Limits(tokens=10**6, prompt_tokens=100, seconds=60.0), slots) as port:
        body = json.dumps({"prompt": "ab", "stream": stream, **ENDLESS}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                time.sleep(0.2)
        began = time.monotonic()
        assert text_of(complete(port, prompt="ab", max_tokens=3, temperature=0)) == continued(model, "ab", 3)
        assert time.monotonic() - began < 10


def test_too_many_requests_are_told_to_come_again(model, slots, monkeypatch):
    from loglinear.cli.serving import app

    monkeypatch.setattr(app, "MOST_REQUESTS", 2)
    with served(model, Limits(tokens=10**6, prompt_tokens=100, seconds=1.0), slots) as port:
        asked = {"prompt": "ab", **ENDLESS}
        threads = [threading.Thread(target=complete, args=(port,), kwargs=asked) for _ in range(2)]
        [thread.start() for thread in threads]
        time.sleep(0.3)
        status, body = complete(port, **asked)
        assert status == 429 and "2 requests are open" in refusal((status, body))
        [thread.join() for thread in threads]
        assert complete(port, prompt="ab", max_tokens=1)[0] == 200


def test_clients_that_leave_are_counted_until_their_turn_has_come(model, monkeypatch):
    from loglinear.cli.serving import app

    monkeypatch.setattr(app, "MOST_REQUESTS", 3)
    with served(model, Limits(tokens=10**6, prompt_tokens=100, seconds=3.0), slots=0) as port:
        long = threading.Thread(target=complete, args=(port,), kwargs=ENDLESS)
        long.start()
        time.sleep(0.3)
        for _ in range(2):
            with pytest.raises(TimeoutError):
                ask(port, COMPLETIONS, {"prompt": "ab"}, timeout=0.2)
        assert complete(port, prompt="ab")[0] == 429
        long.join()
        assert complete(port, prompt="ab", max_tokens=1)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_turn_that_no_thread_takes_is_over(model, monkeypatch, stream):
    from loglinear.cli.serving import app, turns

    def full(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(app, "MOST_REQUESTS", 2)
    with served(model) as port:
        with monkeypatch.context() as patched:
            patched.setattr(turns.threading.Thread, "start", full)
            assert [complete(port, prompt="ab", stream=stream)[0] for _ in range(3)] == [500] * 3
        assert complete(port, prompt="ab", max_tokens=1)[0] == 200


def turn(model, seconds):
    limits = Limits(tokens=10, prompt_tokens=10, seconds=seconds)
    return Turn(model, ByteTokenizer(), limits, options={}, stops=[], seed=0)


def test_a_prompt_is_left_at_the_next_block_when_the_time_or_the_client_is_gone(model):
    asked = dict(input_ids=torch.tensor([[1, 2, 3]]), generation_config=model.generation_config)
    with pytest.raises(Refused, match="the prompt took more than this server's 0 seconds"):
        turn(model, 0.0).generate(**asked)
    left = turn(model, 10.0)
    left.cancel()
    with pytest.raises(TurnEnded):
        left.generate(**asked)
    assert not any(block._forward_pre_hooks for block in model.model.layers)


def test_a_failure_of_the_model_is_one_line_and_the_server_goes_on(model, slots, monkeypatch, capfd):
    def fails(*inputs, **arguments):
        raise RuntimeError("secrets of\nthe model")

    with served(model, slots=slots) as port:
        with monkeypatch.context() as patched:
            patched.setattr(model, "generate", fails)
            status, body = complete(port, prompt="ab", max_tokens=3)
        assert status == 500 and json.loads(body)["error"]["message"] == "the server failed; its log says why"
        assert text_of(complete(port, prompt="ab", max_tokens=3, temperature=0)) == continued(model, "ab", 3)
    assert "secrets of" in capfd.readouterr().err


def test_a_chat_template_that_refuses_is_one_line(model, monkeypatch):
    from loglinear.cli import serve

    monkeypatch.setattr(serve, "CHAT_TEMPLATE", "{{ raise_exception('roles\nmust alternate') }}")
    with served(model) as port:
        answer = ask(port, CHATS, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1})
    assert refusal(answer) == "the chat template refuses these messages: roles must alternate"


def stream(port, moments, **fields):
    """Read a stream, and note the moment of every line."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"stream": True, "temperature": 0, **fields})
    connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    while response.readline():
        moments.append(time.monotonic())
    connection.close()


def test_a_second_stream_does_not_wait_for_the_end_of_the_first(model):
    with served(model, Limits(tokens=2000, prompt_tokens=100, seconds=60.0)) as port:
        first, second = [], []
        bias = ENDLESS["logit_bias"]
        long = threading.Thread(target=stream, args=(port, first), kwargs=dict(max_tokens=1000, logit_bias=bias))
        long.start()
        while not first:
            time.sleep(0.001)
        stream(port, second, prompt="ab", max_tokens=5)
        assert long.is_alive()
        long.join()
        assert second[-1] < first[-1]


def test_many_clients_get_the_texts_of_generate(model):
    """More clients than rows, whose prompts begin alike or not."""
    prompts = ["ab", "abc", "line 1", "é", "ab" * 300, "ab" * 300 + "c"] * 3
    with served(model) as port, ThreadPoolExecutor(len(prompts)) as clients:
        ask_for = partial(complete, port, max_tokens=30, temperature=0)
        texts = list(clients.map(lambda prompt: text_of(ask_for(prompt=prompt)), prompts))
    assert texts == [continued(model, prompt, 30) for prompt in prompts]


def test_turns_are_announced(model, capsys):
    routed = LogLinearForCausalLM(tiny_config(**ROUTED, decode_top_k=1))
    assert [engine_of(*asked, 16) for asked in ((model, 0), (torch.nn.Linear(1, 1), 4), (routed, 4))] == [None] * 3
    assert capsys.readouterr().err.splitlines() == [
        "requests are answered one after the other: --slots is 0",
        "requests are answered one after the other: slots are for models of this library, not Linear",
        "requests are answered one after the other: slots read all buckets, and this model has a decode_top_k",
    ]

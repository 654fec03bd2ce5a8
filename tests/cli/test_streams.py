"""Streams of the server: their events, their text, and their end."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from loglinear.cli.serving.turns import Limits, WholeStreamer
from loglinear.training import ByteTokenizer
from tests.cli.server import NAME, ask, refusal, served

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
FIRST_BYTE = {str("é".encode()[0]): 100.0}  # every token begins a character of two bytes


def asked(kind, **fields):
    start = {"prompt": "ab"} if kind == COMPLETIONS else {"messages": [{"role": "user", "content": "ab"}]}
    return {**start, "temperature": 0, **fields}


def events(answer):
    """The data of every event of a stream."""
    status, body = answer
    assert status == 200 and body.endswith(b"\n\n")
    parts = body.decode().removesuffix("\n\n").split("\n\n")
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [part.removeprefix("data: ") for part in parts]


def text_of(choice):
    return choice["text"] if "text" in choice else (choice.get("message") or choice.get("delta")).get("content") or ""


@pytest.mark.parametrize("kind", [COMPLETIONS, CHATS])
def test_a_stream_ends_with_done(port, kind):
    *chunks, last = events(ask(port, kind, asked(kind, max_tokens=4, stream=True)))
    assert last == "[DONE]"
    assert json.loads(chunks[-1])["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("kind", [COMPLETIONS, CHATS])
@pytest.mark.parametrize("bias", [FIRST_BYTE, {}, {"255": 100.0}], ids=["a first byte", "text", "no byte of UTF-8"])
def test_a_stream_has_the_text_of_the_whole_answer(port, kind, bias):
    fields = asked(kind, max_tokens=3, logit_bias=bias)
    whole = text_of(json.loads(ask(port, kind, fields)[1])["choices"][0])
    chunks = events(ask(port, kind, {**fields, "stream": True}))[:-1]
    assert "".join(text_of(json.loads(chunk)["choices"][0]) for chunk in chunks) == whole
    assert not bias or "\ufffd" in whole


@pytest.mark.parametrize("kind", [COMPLETIONS, CHATS])
def test_a_stream_that_fails_says_so_in_one_event(model, slots, kind, monkeypatch, capfd):
    def fails(*inputs, **arguments):
        raise RuntimeError('secrets of\n\nthe "model"')

    with served(model, slots=slots) as port:
        with monkeypatch.context() as patched:
            patched.setattr(model, "generate", fails)
            *_, error, last = events(ask(port, kind, asked(kind, max_tokens=3, stream=True)))
        expected = {"message": "the server failed; its log says why", "type": "server_error"}
        assert json.loads(error)["error"] == {**expected, "param": None, "code": None} and last == "[DONE]"
    assert "secrets of" in capfd.readouterr().err


def test_a_stream_whose_prompt_takes_too_long_is_refused_in_one_event(model, slots):
    with served(model, Limits(tokens=10, prompt_tokens=100, seconds=-1.0), slots) as port:
        error, last = events(ask(port, COMPLETIONS, asked(COMPLETIONS, stream=True)))
    error = json.loads(error)["error"]
    assert error["type"] == "invalid_request_error" and last == "[DONE]"
    assert error["message"].startswith("the prompt took more than this server's -1 seconds")


def test_the_model_can_be_asked_for(port):
    status, body = ask(port, f"/v1/models/{NAME}")
    assert status == 200 and json.loads(body) == json.loads(ask(port, "/v1/models")[1])["data"][0]
    assert refusal(ask(port, "/v1/models/another")) == f"there is no model 'another', only '{NAME}'"


def test_openais_client_finds_a_model_by_its_path(model):
    from openai import NotFoundError, OpenAI

    with (
        served(model, name="/runs/a b") as port,
        OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client,
    ):
        assert client.models.retrieve("/runs/a b").id == "/runs/a b"
        with pytest.raises(NotFoundError):
            client.models.retrieve("/runs")


def test_clients_that_leave_while_they_wait_leave_nothing(model):
    """No thread and no prompt of them waits for the row of a long answer."""
    with served(model, Limits(tokens=10**6, prompt_tokens=3000, seconds=60.0), slots=1) as port:
        endless = {"max_tokens": 10**6, "logit_bias": {str(ByteTokenizer().eos_token_id): -100}}
        long = threading.Thread(target=lambda: pytest.raises(TimeoutError, ask, port, COMPLETIONS, endless, timeout=4))
        long.start()
        time.sleep(0.5)
        before = threading.active_count()
        for _ in range(5):
            with pytest.raises(TimeoutError):
                ask(port, COMPLETIONS, {"prompt": "ab" * 1000}, timeout=0.2)
        time.sleep(0.5)
        assert threading.active_count() == before and long.is_alive()
        long.join()


@pytest.mark.parametrize("bytes_", [b"ab\xc3", b"\xff", b"ab", "é".encode(), b""])
def test_a_parsed_stream_has_the_whole_text_too(bytes_):
    """Tokenizers with a template of answers stream through a parser."""
    utils = pytest.importorskip("transformers.cli.serving.utils")
    if not hasattr(utils, "ResponseParser"):
        pytest.skip("this version of transformers parses no answers")
    parser = utils.ResponseParser(
        {"start_anchor": ">", "fields": {"content": {"content": "text"}}}, prefix=">", tools=None
    )
    sent, tokenizer = [], ByteTokenizer()
    loop = SimpleNamespace(call_soon_threadsafe=lambda call, *arguments: call(*arguments))
    queue = SimpleNamespace(put_nowait=sent.append)
    streamer = WholeStreamer(tokenizer._tokenizer, loop, queue, response_parser=parser)
    streamer.put(torch.tensor([[1, 2]]))
    for byte in bytes_:
        streamer.put(torch.tensor([byte]))
    streamer.end()
    assert sent.pop() is None and "".join(sent) == tokenizer.decode(list(bytes_))

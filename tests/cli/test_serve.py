"""`loglinear serve` in a process of its own, asked by OpenAI's client."""

import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import uvicorn

from loglinear.cli import main, serve
from loglinear.evaluation import sample
from loglinear.training import ByteTokenizer, load_model
from loglinear.training.train import train
from tests.training.tiny import tiny_recipe, write_text

PROMPT, TOKENS = "line 1", 60


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder of a model that has learnt to write lines like those of its text."""
    folder = tmp_path_factory.mktemp("serve")
    changes = {"steps": 60, "eval_every": 60, "save_every": 60, "learning_rate": 2e-2}
    train(tiny_recipe(write_text(folder / "text"), **changes), folder / "run", progress=False)
    return folder / "run"


def free_port():
    with socket.create_server(("localhost", 0)) as listener:
        return listener.getsockname()[1]


def wait_for(url, process):
    while process.poll() is None:
        try:
            return urllib.request.urlopen(url).close()
        except OSError:
            time.sleep(0.1)
    pytest.fail(process.communicate()[1])


@pytest.fixture(scope="module")
def client(run):
    """A client of a server that Ctrl-C has to end."""
    from openai import OpenAI

    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "loglinear.cli", "serve", "--model", str(run), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(f"http://localhost:{port}/health", process)
        with OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none") as client:
            yield client
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 130 and errors.endswith("interrupted\n") and "Traceback" not in errors
    finally:
        process.kill()


@pytest.fixture(scope="module")
def expected(run):
    result = sample(load_model(run), ByteTokenizer(), PROMPT, max_new_tokens=TOKENS, temperature=0)
    return result.text.removeprefix(PROMPT)


def test_completions_are_those_of_generate(client, run, expected):
    request = {"model": str(run), "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    whole = client.completions.create(**request)
    assert whole.choices[0].text == expected and whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (1 + len(PROMPT), TOKENS)
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
    assert len(pieces) > TOKENS // 2 and "".join(pieces) == expected
    stopped = client.completions.create(**request, stop="file")
    assert stopped.choices[0].text == expected[: expected.index("file") + len("file")]


def test_temperature_samples(client, run, expected):
    request = {"model": str(run), "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 1.5, "seed": 1}
    first, again = (client.completions.create(**request).choices[0].text for _ in range(2))
    assert first == again != expected


def test_a_chat_of_one_message_is_a_completion(client, run, expected):
    messages = [{"role": "user", "content": PROMPT}]
    request = {"model": str(run), "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    assert client.chat.completions.create(**request).choices[0].message.content == expected
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**request, stream=True)]
    assert "".join(pieces) == expected


def test_end_of_sequence_ends_the_answer(client, run):
    likely = {str(ByteTokenizer().eos_token_id): 100.0}
    messages = [{"role": "user", "content": PROMPT}]
    answer = client.chat.completions.create(model=str(run), messages=messages, logit_bias=likely).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("", "stop")


def test_the_model_has_the_name_that_was_given(client, run):
    from openai import NotFoundError

    assert [model.id for model in client.models.list()] == [str(run)]
    with pytest.raises(NotFoundError):
        client.completions.create(model="another", prompt=PROMPT)


def one_line(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["serve", *map(str, arguments)])
    errors = capsys.readouterr().err
    assert exit_.value.code == 2 and errors.startswith("error: ") and errors.count("\n") == 1
    return errors


def test_missing_packages_are_one_line(capsys, monkeypatch, run):
    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    assert "pip install 'loglinear[serve]'" in one_line(capsys, "--model", run)


def test_a_server_that_a_lost_signal_ended_was_interrupted(capsys, monkeypatch, run):
    """uvicorn raises the signal again when it has shut down; the exception is lost where nobody can catch it."""
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: None)
    with pytest.raises(SystemExit) as exit_:
        main(["serve", "--model", str(run), "--port", str(free_port())])
    assert exit_.value.code == 130 and capsys.readouterr().err.endswith("interrupted\n")


def test_a_taken_port_is_one_line(capsys, run):
    with socket.create_server(("localhost", 0)) as listener:
        port = listener.getsockname()[1]
        message = one_line(capsys, "--model", run, "--port", port)
    assert message == f"error: --port {port} cannot be used at localhost: Address already in use\n"


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid"])  # documentation's address, and no name
def test_an_address_of_another_machine_is_one_line(capsys, run, host):
    message = one_line(capsys, "--model", run, "--host", host, "--port", free_port())
    assert message == f"error: --host must be an address of this machine, got '{host}'\n"

"""A server in a thread of this process, with a tiny model, and plain HTTP to it."""

import contextlib
import json
import socket
import threading
import time
from http.client import HTTPConnection

import torch
import uvicorn
from transformers.utils import logging

from loglinear.cli.serve import engine_of, prepare
from loglinear.cli.serving.app import application
from loglinear.cli.serving.turns import Limits
from loglinear.models import LogLinearForCausalLM
from loglinear.training import ByteTokenizer
from tests.training.tiny import tiny_recipe

LIMITS = Limits(tokens=2000, prompt_tokens=3000, seconds=20.0)
NAME = "tiny"


def tiny_model(**changes):
    """Random weights that do not end a text early: greedy text of them is as good as any for comparisons."""
    torch.manual_seed(1)
    model = LogLinearForCausalLM(tiny_recipe("data").override(**changes).model_config()).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4) if parameter.dim() == 2 else None
    return model


@contextlib.contextmanager
def served(model, limits=LIMITS, slots=4, name=NAME):
    """The port of a server that lives as long as the context. With 0 slots requests take turns."""
    tokenizer, engine = ByteTokenizer(), engine_of(model, slots, 16)
    logging.set_verbosity_error()
    prepare(model, tokenizer)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        options = dict(log_level="error", ws="none", lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(uvicorn.Config(application(name, model, tokenizer, limits, engine), **options))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield port
        finally:
            server.should_exit = True
            thread.join()


def ask(port, path, body=None, *, method=None, headers=None, timeout=30):
    """Status and body of one exchange; a dict is sent as JSON."""
    data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
    connection = HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        headers = {"Content-Type": "application/json"} if headers is None else headers
        connection.request(method or ("GET" if data is None else "POST"), path, data, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def complete(port, **fields):
    return ask(port, "/v1/completions", fields)


def refusal(answer):
    """The message of an error in OpenAI's shape."""
    status, body = answer
    error = json.loads(body)["error"]
    assert 400 <= status < 500 and set(error) == {"message", "type", "param", "code"}, answer
    assert error["type"] == "invalid_request_error" and error["message"] and "\n" not in error["message"]
    return error["message"]

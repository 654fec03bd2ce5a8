"""`loglinear serve --engine vllm`: vLLM's own server answers as this library's does."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from loglinear.data.tokenizer import load_tokenizer
from loglinear.models import ByteTokenizer
from tests.cli.command_line import assert_one_line, in_process
from tests.cli.server import ask, tiny_model

HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.fixture
def checkpoint(tmp_path):
    """A run's folder, its checkpoint and its model."""
    model, folder = tiny_model(), tmp_path / "run" / "checkpoint-10"
    model.save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_without_vllm_one_line_says_how_to_install_it(checkpoint, capsys):
    result = in_process(capsys, "serve", "--model", checkpoint.parent, "--engine", "vllm")
    assert_one_line(result, "--engine vllm needs vLLM: pip install 'loglinear[vllm]'")


@pytest.mark.vllm
@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed: `make test-vllm` makes an environment for it")
def test_completions_are_those_of_generate(checkpoint, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    words = ["serve", "--model", str(checkpoint.parent), "--engine", "vllm", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--max-prompt", "200", "--max-tokens", "100"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "loglinear", *words], stdout=log, stderr=log, env=environment)
    try:
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                if ask(port, "/health")[0] == 200:
                    break
            except OSError:
                time.sleep(0.5)
        request = {"prompt": "import ", "max_tokens": 40, "temperature": 0, "logit_bias": {"257": -100}}
        for byte in range(128, 256):
            request["logit_bias"][str(byte)] = -100  # vLLM holds back bytes that are no character yet
        status, body = ask(port, "/v1/completions", request)
        assert status == 200, body
        tokenizer = load_tokenizer(checkpoint, 264)
        ids = torch.tensor([[tokenizer.bos_token_id, *b"import "]])
        banned = [*range(128, 256), 257]
        alone = tiny_model().generate(ids, max_new_tokens=40, do_sample=False, suppress_tokens=banned)
        assert json.loads(body)["choices"][0]["text"] == tokenizer.decode(alone[0, 8:], skip_special_tokens=True)
        assert json.loads(ask(port, "/v1/models")[1])["data"][0]["id"] == str(checkpoint.parent)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)

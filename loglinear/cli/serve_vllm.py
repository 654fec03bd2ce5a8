"""`loglinear serve --engine vllm`: vLLM's own server for one checkpoint."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from loglinear.cli.serve import set_defaults_of_tokenizer
from loglinear.cli.serving.service import Service
from loglinear.data.tokenizer import load_tokenizer
from loglinear.runs.checkpoints import resolve
from loglinear.runs.loading import own_config
from loglinear.runs.upgraded import is_upgraded


def run(path: Path, service: Service) -> None:
    """Serve a checkpoint with vLLM until a signal comes. The model's name is `path`.

    vLLM gets a copy of the tokenizer, with the settings of `loglinear serve`: <bos> in front, and a chat template.
    ValueError without vLLM, for a model that its plugin does not take, or for an option without a meaning there.
    """
    if service.timeout != Service.timeout:
        raise ValueError("--timeout must be left out with --engine vllm, whose answers have no limit of time")
    if service.prefix_cache not in (0, Service.prefix_cache):
        raise ValueError("--prefix-cache must be 0 or left out with --engine vllm, which has pages of its own")
    if service.slots == 0:
        raise ValueError("--slots must be at least 1 with --engine vllm, got 0")
    if find_spec("vllm") is None:
        raise ValueError("--engine vllm needs vLLM: pip install 'loglinear[vllm]', in an environment of its own")
    checkpoint = resolve(path)
    if is_upgraded(checkpoint):
        raise ValueError(
            f"--engine vllm serves models of this library, and {path} is an upgraded model of transformers"
        )
    config = own_config(checkpoint)
    tokenizer = load_tokenizer(checkpoint, config.vocab_size)
    set_defaults_of_tokenizer(tokenizer)
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as the command `vllm` sets it
    command, parser = ServeSubcommand(), FlexibleArgumentParser()
    command.subparser_init(parser.add_subparsers())
    with TemporaryDirectory(prefix="loglinear-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        options = {
            "--tokenizer": folder,
            "--served-model-name": path,
            "--host": service.host,
            "--port": service.port,
            "--dtype": str(config.dtype or "float32").removeprefix("torch."),  # vLLM would round float32 to 16 bits
            "--max-model-len": service.max_prompt + service.max_tokens,
            "--max-num-seqs": service.slots,
        }
        cached = "--enable-prefix-caching" if service.prefix_cache else "--no-enable-prefix-caching"
        words = [str(word) for option in options.items() for word in option]
        arguments = parser.parse_args(["serve", str(checkpoint), *words, cached, "--generation-config", "vllm"])
        command.validate(arguments)
        command.cmd(arguments)

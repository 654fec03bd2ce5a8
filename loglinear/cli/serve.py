"""`loglinear serve`: one checkpoint over HTTP."""

from __future__ import annotations

import errno
import os
import socket
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.import_utils import is_serve_available

from loglinear.cli.serving.service import Service
from loglinear.models import ByteTokenizer, LogLinearForCausalLM, decode_top_k
from loglinear.runs.loading import load_checkpoint
from loglinear.serving import Engine

# A base model knows no turns, so messages become one text. /v1/completions would continue a single message alike.
CHAT_TEMPLATE = "{{ bos_token }}{{ messages | map(attribute='content') | join('\n') }}"
SHUTDOWN_SECONDS = 5  # for answers in progress when a signal comes


def run(path: Path, service: Service) -> None:
    """Serve a checkpoint with OpenAI's API until a signal comes. The model's name is `path`.

    Raises ValueError without the server's packages, or if the port is taken.
    """
    if not is_serve_available():
        raise ValueError("serve needs the fastapi, uvicorn and openai packages: pip install 'loglinear[serve]'")
    import uvicorn

    from loglinear.cli.serving.app import application
    from loglinear.cli.serving.turns import Limits

    host, port = service.host, service.port
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (TypeError, UnicodeError, OSError) as error:
        number = getattr(error, "errno", None)
        if number in (errno.EADDRINUSE, errno.EACCES):
            raise ValueError(f"--port {port} cannot be used at {host}: {os.strerror(number)}") from None
        raise ValueError(f"--host must be an address of this machine, got {ascii(host)}") from None
    logging.set_verbosity_error()
    model, tokenizer = load_checkpoint(path, device="cuda" if torch.cuda.is_available() else "cpu")
    prepare(model, tokenizer)
    limits = Limits(tokens=service.max_tokens, prompt_tokens=service.max_prompt, seconds=service.timeout)
    engine = engine_of(model, service.slots, service.prefix_cache)
    app = application(str(path), model, tokenizer, limits, engine)
    print(f"serving model {str(path)!r} at http://{host}:{port}/v1", file=sys.stderr)
    uvicorn.Server(
        uvicorn.Config(app, host=host, port=port, ws="none", lifespan="off", timeout_graceful_shutdown=SHUTDOWN_SECONDS)
    ).run()
    # Only a signal ends the server. uvicorn raises it again, but a destructor or a callback may lose that exception.
    raise KeyboardInterrupt


def engine_of(model: PreTrainedModel, slots: int, prefix_cache: int) -> Engine | None:
    """Return an engine with `slots` rows and `prefix_cache` MiB of stored states.

    None, with a line on standard error, if requests take turns: with `slots` 0, or for a model that no engine takes.
    """
    if not slots:
        reason = "--slots is 0"
    elif not isinstance(model, LogLinearForCausalLM):
        reason = f"slots are for models of this library, not {type(model).__name__}"
    elif decode_top_k(model) is not None:
        reason = "slots read all buckets, and this model has a decode_top_k"
    else:
        return Engine(model, slots=slots, prefix_bytes=prefix_cache * 2**20)
    print(f"requests are answered one after the other: {reason}", file=sys.stderr)
    return None


def prepare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the defaults that the server takes from the model and the tokenizer.

    Raises ValueError for a tokenizer that the server cannot stream through.
    """
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Without do_sample a request's temperature would have no effect; the server turns it off at temperature 0.
    model.generation_config.update(do_sample=True, top_k=0, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad)
    set_defaults_of_tokenizer(tokenizer)
    if not tokenizer.is_fast:  # the server streams through it
        raise ValueError(f"serve needs a fast tokenizer, got {type(tokenizer).__name__}")


def set_defaults_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer begin prompts as documents begin in training, and give it a chat template if it has none."""
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    if isinstance(tokenizer, ByteTokenizer):
        tokenizer.add_bos_token = True  # type: ignore[misc]  # a prompt begins as a document does in training

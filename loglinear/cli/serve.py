"""`loglinear serve`: transformers' own server, with one checkpoint."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import logging
from transformers.utils.import_utils import is_serve_available

from loglinear.training.checkpoints import load_model, resolve
from loglinear.training.tokenizer import ByteTokenizer, load_tokenizer

# A base model knows no turns: messages become one text, and a single one is continued as /v1/completions would.
CHAT_TEMPLATE = "{{ bos_token }}{{ messages | map(attribute='content') | join('\n') }}"


def run(path: Path, host: str, port: int) -> None:
    """Serve a checkpoint as OpenAI's API until interrupted; `path`, as it was given, is the model's name there.

    Raises ValueError without the server's packages, OSError where the port is taken.
    """
    if not is_serve_available():
        raise ValueError("serve needs the fastapi, uvicorn and openai packages: pip install 'loglinear[serve]'")
    socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    logging.set_verbosity_error()
    model = load_model(path, device="cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(resolve(path), model.config.vocab_size)
    _prepare(model, tokenizer)
    # Serve makes its manager itself, by this name.
    model_manager.ModelManager = _manager(str(path), model, tokenizer)  # type: ignore[misc]
    print(f"model {str(path)!r} at http://{host}:{port}/v1", file=sys.stderr)
    Serve(force_model=str(path), host=host, port=port, log_level="error")
    # Only a signal ends the server, and is raised again then: as an exception, which a destructor or a callback loses.
    raise KeyboardInterrupt


def _prepare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set what the server takes from the model and the tokenizer, and a request does not say."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Without do_sample a request's temperature would do nothing; the server turns it off where that is 0.
    model.generation_config.update(do_sample=True, top_k=0, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    if isinstance(tokenizer, ByteTokenizer):
        tokenizer._tokenizer = byte_decoder(tokenizer)  # the server streams through it


def byte_decoder(tokenizer: ByteTokenizer) -> Tokenizer:
    """The byte tokenizer in the tokenizers library, as far as decoding goes."""
    decoder = Tokenizer(models.BPE({symbol: byte for byte, symbol in bytes_to_unicode().items()}, []))
    decoder.decoder = decoders.ByteLevel()
    decoder.add_tokens(list(tokenizer.added_tokens_decoder.values()))
    return decoder


def _manager(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> type[Any]:
    """A manager of this one model; transformers' own finds classes in transformers alone and lists the Hub's cache."""

    class Manager(model_manager.ModelManager):
        def load_model_and_processor(self, *args: Any, progress_callback: Any = None, **kwargs: Any) -> Any:
            if progress_callback is not None:  # `transformers chat` waits for it
                progress_callback({"status": "ready", "model": name, "cached": True})
            return model, tokenizer

        @staticmethod
        def get_gen_models(cache_dir: str | None = None) -> list[dict]:  # type: ignore[override]
            return [{"id": name, "object": "model", "created": 0, "owned_by": "loglinear"}]

    return Manager

"""`loglinear generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer
from transformers.utils import logging

from loglinear.cli.console import count
from loglinear.evaluation import sample
from loglinear.evaluation.sampling import check_sampling
from loglinear.runs.loading import load_checkpoint


def run(path: Path, prompt: str | None, **sampling: Any) -> None:
    """Write a continuation to standard output and its speed to standard error. `sampling` is as in `sample`."""
    check_sampling(**sampling)
    logging.set_verbosity_error()
    model, tokenizer = load_checkpoint(path, device="cuda" if torch.cuda.is_available() else "cpu")
    text = prompt_text(prompt)
    sys.stdout.write(text)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    result = sample(model, tokenizer, text, streamer=streamer, **sampling)
    rate = result.tokens / result.seconds
    print(f"{count(result.tokens, 'token')} in {result.seconds:.1f} s, {rate:.1f} tokens/s", file=sys.stderr)


def prompt_text(prompt: str | None) -> str:
    """Return the prompt, or standard input without one. Raises ValueError if it is not UTF-8 text."""
    try:
        text = sys.stdin.read() if prompt is None else prompt
        text.encode()
    except UnicodeError as error:
        raise ValueError(f"the prompt is not UTF-8 text: {error}") from error
    return text

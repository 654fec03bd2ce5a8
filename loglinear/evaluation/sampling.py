"""Samples: the continuation of a prompt, its time, and the memory of its state."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase, set_seed

from loglinear.data.tokenizer import encode_prompt

GREEDY = 1e-6  # a lower temperature mixes only logits within a rounding error, and then overflows
HOTTEST = 100.0  # the temperature at which all tokens are nearly equally likely
SEEDS = 2**32  # the limit of numpy's generator, which set_seed also seeds


@dataclass(frozen=True)
class Sample:
    """A prompt and its continuation."""

    text: str  # prompt and continuation
    ids: tuple[int, ...]  # of prompt and continuation
    tokens: int  # of the continuation
    seconds: float
    state_bytes: int  # size of the cache after the last token


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    streamer: Any = None,
    observer: LogitsProcessor | None = None,
) -> Sample:
    """Return a continuation of `prompt` up to the end-of-sequence token or `max_new_tokens` tokens.

    A temperature below 1e-6 is greedy. The prompt begins like a document of the training, with the
    beginning-of-sequence token if there is one. `observer` sees the logits of every step before the temperature.

    Raises ValueError, which names the argument, for a value that cannot work. Raises it also for an empty prompt if the
    tokenizer has no beginning-of-sequence token.
    """
    check_sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    ids = torch.from_numpy(encode_prompt(tokenizer, prompt)[None].astype(np.int64)).to(model.device)
    prompt_tokens = ids.shape[1]
    if prompt_tokens == 0:
        raise ValueError("the prompt is empty, and this tokenizer has no token to begin with: give a text (--prompt)")
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    began = time.perf_counter()
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **(sampling if temperature >= GREEDY else {"do_sample": False}),
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        return_dict_in_generate=True,
        streamer=streamer,
        logits_processor=None if observer is None else LogitsProcessorList([observer]),
        use_cache=True,  # the Trainer of transformers writes False into the configuration that it trains
    )
    seconds = time.perf_counter() - began
    return Sample(
        text=str(tokenizer.decode(output.sequences[0], skip_special_tokens=True)),
        ids=tuple(output.sequences[0].tolist()),
        tokens=output.sequences.shape[1] - prompt_tokens,
        seconds=seconds,
        state_bytes=cache_bytes(output.past_key_values),
    )


def cache_bytes(cache: Any) -> int:
    """Return the bytes of all states, keys and values of a cache, ours or that of an upgraded model; 0 for None."""
    if cache is None:
        return 0
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    total = 0
    for layer in cache.layers:
        parts = (getattr(layer, name, None) for name in ("keys", "values"))
        total += getattr(layer, "nbytes", 0) + sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
    return total


def check_sampling(*, max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    """Raise ValueError, which names the argument of `sample`, for a value that cannot work."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature <= HOTTEST:
        raise ValueError(f"temperature must lie between 0 and {HOTTEST}, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must not be negative, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be more than 0 and at most 1, got {top_p}")
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed must lie between 0 and {SEEDS - 1}, got {seed}")

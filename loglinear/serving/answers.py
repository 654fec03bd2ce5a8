# T tokens, V vocabulary
"""One sequence in the engine: its tokens, its choice of the next one, and its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from loglinear.models import LogLinearCache, LogLinearForCausalLM, decode_top_k

REFUSED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "return_dict_in_generate")
OTHER_MODES = ("penalty_alpha", "dola_layers")  # they choose tokens in other ways
# `generate` adds these, or they decide only how it calculates; or they are checked by themselves.
WITHOUT_EFFECT = ("past_key_values", "position_ids", "logits_to_keep", "use_cache")


class Answer:
    """A prompt [1, T] and what follows it, as `generate` would continue it.

    Args:
        input_ids: The prompt. The next tokens are chosen on its device.
        processors: The changes of the logits.
        criteria: The criteria that end the answer.
        config: The settings of `generate`.

    Raises:
        ValueError: A setting that no row of a batch can have.
    """

    streamer: Any = None
    generator: torch.Generator | None = None
    before_work: Callable[[], None] | None = None
    cache: LogLinearCache | None = None  # of the prompt's first `read` tokens; None: `read` is 0, or a row has them
    read = 0

    def __init__(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ) -> None:
        check_settings(input_ids, config)
        self.processors, self.do_sample = processors, bool(config.do_sample)
        # Most answers end by a length or a token, which a row compares without a tensor.
        self._most = min((c.max_length for c in criteria if type(c) is MaxLengthCriteria), default=None)
        self._ends = {end for c in criteria if type(c) is EosTokenCriteria for end in c.eos_token_id.tolist()}
        self._criteria = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
        self.future: Future[Tensor] = Future()
        self.prompt = input_ids[0].cpu().numpy().astype(np.int32)
        self._ids, self._size = input_ids, input_ids.shape[1]
        self.last = int(self.prompt[-1])  # the newest token, which the model has not read yet

    @property
    def ids(self) -> Any:
        """The prompt and the answer so far [1, T]."""
        return self._ids[:, : self._size]

    @property
    def is_plain(self) -> bool:
        """True if the next token is the likeliest one, whatever the tokens before."""
        return not self.do_sample and not self.processors

    def choose(self, logits: Tensor) -> int:
        """Return the next token from its logits [1, V], as `generate` chooses it."""
        scores = self.processors(self.ids, logits.to(self._ids.device, torch.float32, copy=True))
        if not self.do_sample:
            return int(scores.argmax(-1))
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))

    def append(self, token: int) -> bool:
        """Add a token, and return True if it is the last one."""
        if self._size == self._ids.shape[1]:
            self._ids = torch.cat([self._ids, torch.empty_like(self._ids[:, : max(64, self._size)])], dim=1)
        self._ids[0, self._size] = self.last = token
        self._size += 1
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))
        is_last = token in self._ends or (self._most is not None and self._size >= self._most)
        for criterion in self._criteria:  # all of them, as in `generate`: some count the tokens
            is_last = bool(criterion(self.ids, None).all()) or is_last
        return is_last

    def tokens_read(self) -> np.ndarray:
        """Return all tokens but the newest."""
        return self.ids[0, :-1].cpu().numpy().astype(np.int32)

    def finish(self) -> None:
        """Hand the sequence to the thread that waits for it, if it still does."""
        with suppress(InvalidStateError):
            self.future.set_result(self.ids.clone())

    def fail(self, error: Exception) -> None:
        """Raise an error in the thread that waits, if it still does."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


def check_settings(input_ids: Tensor, config: GenerationConfig) -> None:
    """Raise ValueError, which names it, for a setting that a row of a batch cannot have."""
    for name in ("num_beams", "num_return_sequences"):
        if (value := getattr(config, name) or 1) != 1:
            raise ValueError(f"{name} must be 1 in the engine, got {value}")
    for name in REFUSED:
        if getattr(config, name):
            raise ValueError(f"{name} must be False in the engine, got {getattr(config, name)}")
    for name in OTHER_MODES:
        if getattr(config, name, None) is not None:
            raise ValueError(f"{name} must be None in the engine, got {getattr(config, name)}")
    if input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must be one sequence [1, T] with a token, got shape {list(input_ids.shape)}")


def check_tokens(input_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError for a token that the model does not have, which would end the step of every row."""
    wrong = input_ids[(input_ids < 0) | (input_ids >= vocab_size)]
    if wrong.numel():
        raise ValueError(f"input_ids must be tokens from 0 to {vocab_size - 1}, got {int(wrong[0])}")


def check_inputs(input_ids: Tensor, inputs: Mapping[str, Any]) -> None:
    """Raise ValueError for an input of the model that a row of a batch cannot have."""
    cache, positions = inputs.get("past_key_values"), inputs.get("position_ids")
    if cache is not None and cache.rows is not None:
        raise ValueError("past_key_values must be left out in the engine, which has caches of its own")
    if inputs.get("attention_mask") is not None:
        raise ValueError("attention_mask must be left out in the engine, or be 1 everywhere: a row has no padding")
    if inputs.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds must be left out in the engine, which reads input_ids")
    if positions is not None and positions.flatten().tolist() != list(range(input_ids.shape[1])):
        raise ValueError("position_ids must be left out in the engine, or count from 0: a row is one sequence")
    for name, value in inputs.items():
        if name not in WITHOUT_EFFECT and value is not None and value is not False:
            raise ValueError(f"{name} must be left out in the engine, which reads input_ids alone")


def check_reads_all(model: LogLinearForCausalLM) -> None:
    """Raise ValueError for a model whose steps read few buckets: a prompt's last token is a step here."""
    if (top_k := decode_top_k(model)) is not None:
        raise ValueError(f"decode_top_k must be None in the engine, whose steps also end prompts, got {top_k}")


def seeded_generator(device: torch.device) -> torch.Generator:
    """Return a generator that the default generator seeds, so that the next one is another."""
    return torch.Generator(device).manual_seed(int(torch.randint(2**63 - 1, ())))

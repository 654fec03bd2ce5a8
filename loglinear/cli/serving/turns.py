"""One request's turn at the model: seeded, within its limits, and ended when its client leaves."""

from __future__ import annotations

import asyncio
import threading
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria
from transformers.cli.serving.utils import GenerateManager, GenerationState

from loglinear.cli.serving.requests import Refused


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of one request."""

    tokens: int  # of the answer
    prompt_tokens: int
    seconds: float  # of work for one answer and its prompt; waiting for other requests does not count


class TurnEnded(Exception):
    """The client has left."""


class Turn(StoppingCriteria):
    """A stand-in for the model whose `generate` transformers' handlers call.

    `options` are settings of the GenerationConfig. A string of `stops` ends the answer and stays in it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        *,
        options: dict[str, Any],
        stops: list[str],
        seed: int | None,
    ) -> None:
        self.model, self.tokenizer, self.limits = model, tokenizer, limits
        self.options, self.stops, self.seed = options, stops, seed
        # Most tokens stand for at least one byte; some stand for no text.
        self._tail = 8 + 2 * max((len(stop.encode()) for stop in stops), default=0)
        self._gone = threading.Event()

    def cancel(self) -> None:
        """End the turn from any thread, before the next block of the model."""
        self._gone.set()

    def require_short(self, prompt_tokens: int) -> None:
        """Raise Refused unless a prompt has 1 to `limits.prompt_tokens` tokens."""
        if prompt_tokens > (most := self.limits.prompt_tokens):
            raise Refused(f"the prompt has {prompt_tokens:,} tokens, and this server takes at most {most:,}")
        if prompt_tokens == 0:
            raise Refused("the prompt is empty, and this tokenizer has no token to begin with")

    def generate(self, *, input_ids: Tensor, generation_config: GenerationConfig, **inputs: Any) -> Any:
        """Generate as the model does.

        Raises TurnEnded after `cancel`, and Refused if the time ends while the prompt is read.
        """
        torch.seed() if self.seed is None else torch.manual_seed(self.seed)
        self._end = time.monotonic() + self.limits.seconds
        self._prompt_tokens, self._begun, self._config = input_ids.shape[1], False, generation_config
        generation_config.update(**self.options)
        hooks = [block.register_forward_pre_hook(self._before_block) for block in self.model.base_model.layers]
        try:
            return self.model.generate(
                input_ids=input_ids, generation_config=generation_config, stopping_criteria=[self], **inputs
            )
        finally:
            for hook in hooks:
                hook.remove()

    def _before_block(self, *args: Any) -> None:
        if self._gone.is_set():
            raise TurnEnded
        if not self._begun and time.monotonic() > self._end:
            raise Refused(f"the prompt took more than this server's {self.limits.seconds:g} seconds: make it shorter")

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._begun = True
        answer = input_ids[0, self._prompt_tokens :]
        stopped = bool(self.stops) and self._ends_with_a_stop(answer[-self._tail :])
        if not stopped and time.monotonic() > self._end:
            # the handlers give the reason "length" to an answer with exactly this many tokens
            self._config.max_new_tokens, stopped = len(answer), True
        return torch.full((1,), stopped, device=input_ids.device)

    def _ends_with_a_stop(self, tail: Tensor) -> bool:
        text = self.tokenizer.decode(tail, skip_special_tokens=True)
        return any(stop in text for stop in self.stops)


CURRENT: ContextVar[Turn] = ContextVar("turn")  # of the request in progress


class TurnTaker(GenerateManager):
    """transformers' queue of generations, with the current turn in place of the model."""

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().generate_streaming(_turn(inputs), processor, inputs, *args, **kwargs)

    async def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return await super().generate_non_streaming(_turn(inputs), processor, inputs, *args, **kwargs)

    def async_submit(self, *args: Any, **kwargs: Any) -> asyncio.Future:
        future = super().async_submit(*args, **kwargs)
        # Nothing awaits the future after the client has left: read its exception, so that asyncio reports none. The
        # shield keeps it from being cancelled, because the queue sets its result.
        future.add_done_callback(lambda future: future.exception())
        return asyncio.shield(future)


def _turn(inputs: Any) -> Any:
    turn = CURRENT.get()
    turn.require_short(inputs["input_ids"].shape[1])
    return turn


class OneQueue(GenerationState):
    """The queue of the only model."""

    def __init__(self) -> None:
        super().__init__()
        self._taker = TurnTaker()

    def get_manager(self, model_id: str, use_cb: bool = False) -> TurnTaker:
        return self._taker

"""One request's turn at the model: seeded, within its limits, and ended when its client is gone."""

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
    """What one request may cost."""

    tokens: int  # of the answer
    prompt_tokens: int
    seconds: float  # of work for one answer, its prompt included; waiting for others does not count


class TurnEnded(Exception):
    """The client is gone."""


class Turn(StoppingCriteria):
    """Stands for the model where transformers' handlers call `generate`.

    `options` are settings of the GenerationConfig; `stops` end the answer, and are its last characters.
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
        # A token stands for a byte at least; some stand for no text.
        self._tail = 8 + 2 * max((len(stop.encode()) for stop in stops), default=0)
        self._gone = threading.Event()

    def cancel(self) -> None:
        """End it, from any thread: at the next block of the model, or before its first."""
        self._gone.set()

    def require_short(self, prompt_tokens: int) -> None:
        """Raise Refused unless a prompt has 1 to `limits.prompt_tokens` tokens."""
        if prompt_tokens > (most := self.limits.prompt_tokens):
            raise Refused(f"the prompt has {prompt_tokens:,} tokens, and this server takes at most {most:,}")
        if prompt_tokens == 0:
            raise Refused("the prompt is empty, and this tokenizer has no token to begin with")

    def generate(self, *, input_ids: Tensor, generation_config: GenerationConfig, **inputs: Any) -> Any:
        """As the model's. Raises TurnEnded after `cancel`, Refused where the time ends within the prompt."""
        torch.seed() if self.seed is None else torch.manual_seed(self.seed)
        self._end = time.monotonic() + self.limits.seconds
        self._prompt_tokens, self._begun, self._config = input_ids.shape[1], False, generation_config
        generation_config.update(**self.options)
        hooks = [block.register_forward_pre_hook(self._before_block) for block in self.model.model.layers]
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
            # the handlers say "length" of an answer that has as many tokens as this says
            self._config.max_new_tokens, stopped = len(answer), True
        return torch.full((1,), stopped, device=input_ids.device)

    def _ends_with_a_stop(self, tail: Tensor) -> bool:
        text = self.tokenizer.decode(tail, skip_special_tokens=True)
        return any(stop in text for stop in self.stops)


CURRENT: ContextVar[Turn] = ContextVar("turn")  # of the request that is being handled


class TurnTaker(GenerateManager):
    """transformers' queue of generations, with the current turn in the place of the model."""

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().generate_streaming(_turn(inputs), processor, inputs, *args, **kwargs)

    async def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return await super().generate_non_streaming(_turn(inputs), processor, inputs, *args, **kwargs)

    def async_submit(self, *args: Any, **kwargs: Any) -> asyncio.Future:
        future = super().async_submit(*args, **kwargs)
        # Where the client has left nobody awaits it: its exception is no news, and it must not be cancelled, because
        # the queue sets its result.
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

"""One request's turn at the model: seeded, within its limits, and ended when its client leaves.

With an engine the turns of several requests run at once, as rows of one batch. Without one they follow each other.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria
from transformers.cli.serving.utils import DirectStreamer, GenerateManager, GenerationState

from loglinear.cli.serving.requests import Refused
from loglinear.serving import Engine


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of one request."""

    tokens: int  # of the answer
    prompt_tokens: int
    seconds: float  # from the first piece of the prompt to the end of the answer; waiting before does not count


class TurnEnded(Exception):
    """The client has left."""


class Turn(StoppingCriteria):
    """A stand-in for the model whose `generate` transformers' handlers call.

    `options` are settings of the GenerationConfig. A string of `stops` ends the answer and stays in it. With an engine
    the answer is one of its rows.
    """

    engine: Engine | None = None
    is_queued = False  # True from the moment in which it waits for the model until `generate` has ended
    _end: float | None = None  # of its time; None: no work has begun

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
        self._row: Future[Tensor] = Future()

    def cancel(self) -> None:
        """End the turn from any thread, before the next block of the model, or at once if it waits for a row."""
        self._gone.set()
        self._row.cancel()

    @property
    def is_over(self) -> bool:
        """True after `cancel`, when the turn waits for nothing any more."""
        return self._gone.is_set() and not self.is_queued

    @contextmanager
    def queued(self) -> Iterator[None]:
        """Hand the turn to a thread, which ends it by `generate`. An error here means that no thread has it."""
        self.is_queued = True
        try:
            yield
        except Exception:
            self.is_queued = False
            raise

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
        try:
            return self._generate(input_ids, generation_config, inputs)
        except CancelledError:
            raise TurnEnded from None
        finally:
            self.is_queued = False

    def _generate(self, input_ids: Tensor, generation_config: GenerationConfig, inputs: dict[str, Any]) -> Any:
        self._prompt_tokens, self._begun, self._config = input_ids.shape[1], False, generation_config
        generation_config.update(**self.options)
        inputs |= dict(input_ids=input_ids, generation_config=generation_config, stopping_criteria=[self])
        if self.engine is not None:
            inputs["input_ids"] = input_ids.cpu()  # a row's token is chosen there: a GPU would wait for every row
            generator = torch.Generator()
            generator.seed() if self.seed is None else generator.manual_seed(self.seed)
            return self.engine.generate(**inputs, generator=generator, before_work=self._check, future=self._row)
        torch.seed() if self.seed is None else torch.manual_seed(self.seed)
        hooks = [block.register_forward_pre_hook(self._check) for block in self.model.base_model.layers]
        try:
            return self.model.generate(**inputs)
        finally:
            for hook in hooks:
                hook.remove()

    def _check(self, *args: Any) -> None:
        """Raise if the client or the time is gone. The first call, before any work on the prompt, starts the time."""
        if self._gone.is_set():
            raise TurnEnded
        if self._end is None:
            self._end = time.monotonic() + self.limits.seconds
        if not self._begun and time.monotonic() > self._end:
            raise Refused(f"the prompt took more than this server's {self.limits.seconds:g} seconds: make it shorter")

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self._gone.is_set():
            raise TurnEnded
        assert self._end is not None
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


class Texts:
    """The queue of a stream's texts. Its end may be an exception, which `get` raises after all texts before it."""

    def __init__(self) -> None:
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self._error: Exception | None = None

    def put_nowait(self, item: Any) -> None:
        self._items.put_nowait(item)

    async def get(self) -> Any:
        item = await self._items.get() if self._error is None else self._error
        if isinstance(item, Exception):
            raise item
        return item

    def get_nowait(self) -> Any:
        item = self._items.get_nowait()
        if isinstance(item, Exception):
            self._error = item
            raise asyncio.QueueEmpty
        return item


class WholeStreamer(DirectStreamer):
    """transformers' streamer, which also sends the text of last tokens that are no whole character."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ids: list[int] = []

    def put(self, value: Tensor) -> None:
        is_prompt = self._first
        super().put(value)
        self._ids += [] if is_prompt else value.tolist()

    def end(self) -> None:
        if rest := self._rest():
            for item in [rest] if self._parser is None else _items_of(self._parser.feed(rest)):
                self._enqueue(item)
        super().end()

    def _rest(self) -> str:
        """Return the text that has not been sent. transformers' stream waits for the end of the character."""
        skips = self._parser is None
        again = DecodeStream([], skip_special_tokens=skips)
        sent = "".join(again.step(self._tokenizer, token) or "" for token in self._ids)
        return self._tokenizer.decode(self._ids, skip_special_tokens=skips)[len(sent) :]


CURRENT: ContextVar[Turn] = ContextVar("turn")  # of the request in progress


class TurnTaker(GenerateManager):
    """transformers' queue of generations, with the current turn in place of the model."""

    def generate_streaming(  # type: ignore[override]
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str, **parser: Any
    ) -> tuple[Texts, WholeStreamer]:
        """Start the turn. Its texts come through the first object, and an error of it is raised there."""
        turn, texts, loop = _turn(inputs), Texts(), asyncio.get_running_loop()
        streamer = WholeStreamer(processor._tokenizer, loop, texts, **parser)  # type: ignore[arg-type]

        def run() -> None:
            try:
                turn.generate(**inputs, streamer=streamer, generation_config=gen_config, tokenizer=processor)
            except Exception as error:
                loop.call_soon_threadsafe(texts.put_nowait, error)

        with turn.queued():
            self.submit(run)
        return texts, streamer

    async def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        turn = _turn(inputs)
        with turn.queued():
            return await super().generate_non_streaming(turn, processor, inputs, *args, **kwargs)

    def async_submit(self, *args: Any, **kwargs: Any) -> asyncio.Future:
        future = self._submit(*args, **kwargs)
        # Nothing awaits the future after the client has left: read its exception, so that asyncio reports none. The
        # shield keeps it from being cancelled, because the queue sets its result.
        future.add_done_callback(lambda future: future.exception())
        return asyncio.shield(future)

    def _submit(self, *args: Any, **kwargs: Any) -> asyncio.Future:
        return super().async_submit(*args, **kwargs)


class RowTaker(TurnTaker):
    """All turns at once, each in a thread that waits for its row of an engine."""

    def __init__(self) -> None:
        """Start no thread: each turn has its own."""

    def submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    def _submit(self, *args: Any, **kwargs: Any) -> asyncio.Future:
        return asyncio.wrap_future(self.submit(*args, **kwargs))


def _items_of(events: Any) -> list[Any]:
    from transformers.cli.serving.utils import response_events_to_chunks  # of the versions that have parsers

    return list(response_events_to_chunks(events))


def _turn(inputs: Any) -> Any:
    turn = CURRENT.get()
    turn.require_short(inputs["input_ids"].shape[1])
    return turn


class OneQueue(GenerationState):
    """The queue of the only model, whose turns follow each other or run at once."""

    def __init__(self, at_once: bool) -> None:
        super().__init__()
        self._taker = RowTaker() if at_once else TurnTaker()

    def get_manager(self, model_id: str, use_cb: bool = False) -> TurnTaker:
        return self._taker

# N rows in use
"""Continuous batching: every step takes one token of each sequence, and sequences join and leave between steps."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers.generation import StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from loglinear.models import LogLinearCache, LogLinearForCausalLM
from loglinear.ops.validation import whole_number
from loglinear.serving.answers import Answer, check_inputs, check_reads_all, check_tokens, seeded_generator
from loglinear.serving.prefixes import FEWEST_SHARED, PrefixCache
from loglinear.serving.slots import Slots

LEAST_PIECE = 64  # tokens that a shorter piece of a prompt counts as, because a forward pass takes that long


class Engine:
    """`generate` for many threads at once, whose calls are rows of one batch:

        engine = Engine(model)
        engine.generate(input_ids, max_new_tokens=100)  # each thread calls it for a sequence of its own

    Every call returns the tokens that `model.generate` would return, up to rounding. Prompts are read in pieces between
    the steps, in turn. The last token of a prompt is its row's first step. Calls wait in the order of their arrival for
    a free row.

    A prompt that begins like an earlier sequence continues from a copy of a stored state. States are stored at the end
    of prompts and of answers, and where a prompt leaves an earlier sequence.

    Args:
        model: A `LogLinearForCausalLM` in evaluation mode: any variant, routed or not, hybrids and Transformers.
        slots: The most sequences at once. Their memory is allocated here.
        prefill_tokens: The most tokens of prompts between two steps.
        prefix_bytes: The most bytes of stored states. 0: none are stored.

    Raises:
        ValueError: The model is of another class or has a `decode_top_k`, or a number is out of range.
    """

    def __init__(
        self,
        model: LogLinearForCausalLM,
        *,
        slots: int = 16,
        prefill_tokens: int = 512,
        prefix_bytes: int = 256 * 2**20,
    ) -> None:
        if not isinstance(model, LogLinearForCausalLM):
            raise ValueError(f"model must be a LogLinearForCausalLM, got {type(model).__name__}")
        check_reads_all(model)
        self.model, self.prefill_tokens = model, whole_number("prefill_tokens", prefill_tokens)
        self.slots = Slots(model, whole_number("slots", slots))
        self.prefixes = PrefixCache(prefix_bytes if prefix_bytes == 0 else whole_number("prefix_bytes", prefix_bytes))
        self._lock, self._is_running = threading.Lock(), False
        self._waiting: deque[Answer] = deque()
        self._reading: deque[Answer] = deque()
        self._rows: list[Answer] = []

    def generate(
        self,
        input_ids: Tensor,
        *,
        streamer: Any = None,
        generator: torch.Generator | None = None,
        before_work: Callable[[], None] | None = None,
        future: Future[Tensor] | None = None,
        stopping_criteria: Iterable[StoppingCriteria] = (),
        stop_strings: str | list[str] | None = None,
        tokenizer: Any = None,
        **arguments: Any,
    ) -> Tensor:
        """Return a prompt and its continuation [1, T], as `model.generate` does.

        Args:
            input_ids: [1, T], the prompt. The next tokens are chosen on its device.
            streamer: Gets the prompt, and then each token from the engine's thread. None: no streamer.
            generator: The random numbers of a sampled answer, on the device of input_ids. None: a generator that
                the calling thread's default generator seeds.
            before_work: Called in the engine's thread before each piece of the prompt. An exception of it, of the
                streamer or of a stopping criterion ends this call alone, which raises it.
            future: The result to be. Another thread may cancel it: the call ends with CancelledError, also while it
                waits for a row. None: nobody else holds it.
            stopping_criteria: Further criteria that end the answer.
            stop_strings: Texts that end the answer; they need the tokenizer.
            tokenizer: The tokenizer of stop_strings.
            **arguments: Those of `model.generate`: a `generation_config` or its fields. Without an attention_mask
                every token of input_ids is one, also a token that pads elsewhere.

        Raises:
            ValueError: The batch has more than one sequence, a token is outside the vocabulary, the model has a
                `decode_top_k`, or an argument asks for beams, for several answers, for a given cache or for other
                results than the tokens.
            concurrent.futures.CancelledError: `future` was cancelled.
        """
        check_reads_all(self.model)
        criteria = StoppingCriteriaList(stopping_criteria)
        if stop_strings is not None:
            criteria.append(StopStringCriteria(tokenizer, stop_strings))

        def decode(
            model: Any,
            input_ids: Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **inputs: Any,
        ) -> Tensor:
            check_tokens(input_ids, self.model.config.vocab_size)
            answer = Answer(input_ids, logits_processor, stopping_criteria, generation_config)
            check_inputs(input_ids, inputs)
            answer.streamer, answer.before_work = streamer, before_work
            answer.future = answer.future if future is None else future
            if answer.do_sample:
                answer.generator = seeded_generator(input_ids.device) if generator is None else generator
            return self._answered(answer)

        if streamer is not None:
            streamer.put(input_ids.cpu())
        # `generate` prepares the settings, and calls `decode` in the place of its loop, but without the streamer.
        arguments.setdefault("attention_mask", torch.ones_like(input_ids))
        model: Any = self.model
        ids = model.generate(input_ids, custom_generate=decode, stopping_criteria=criteria, **arguments)
        if streamer is not None:
            streamer.end()
        return ids

    def _answered(self, answer: Answer) -> Tensor:
        """Wait for an answer. If the wait is interrupted, the answer leaves its row or the queue for one."""
        with self._lock:
            if not self._is_running:  # the thread begins by waiting for the lock, and it may fail to start
                threading.Thread(target=self._run, name="loglinear-engine", daemon=True).start()
                self._is_running = True
            self._waiting.append(answer)
        try:
            return answer.future.result()
        except BaseException:
            answer.future.cancel()
            with self._lock, suppress(ValueError):
                self._waiting.remove(answer)
            raise

    @torch.no_grad()
    def _run(self) -> None:
        """Work until no answer is left. The thread ends then, so an engine without work holds none."""
        while self._has_work():
            self._read_prompts()
            try:
                self._step()
            except Exception as error:  # of the model: no row can go on
                for answer in self._rows:
                    answer.fail(error)
                self._rows.clear()
                self.slots.clear()

    def _has_work(self) -> bool:
        """Give free rows to those who wait, and return True if any answer is left."""
        with self._lock:
            while self._waiting and len(self._rows) + len(self._reading) < self.slots.count:
                self._reading.append(self._waiting.popleft())
            self._is_running = bool(self._rows or self._reading)
            return self._is_running

    def _read_prompts(self) -> None:
        """Read pieces of prompts in turn, at most `prefill_tokens` tokens. A prompt that has been read gets a row."""
        left = self.prefill_tokens
        while self._reading and left > 0:
            answer = self._reading.popleft()
            if answer.future.cancelled():
                continue
            try:
                if answer.before_work is not None:
                    answer.before_work()
                left -= max(self._read_piece(answer, left), LEAST_PIECE)
                if answer.read < len(answer.prompt) - 1:
                    self._reading.append(answer)
                else:
                    self.slots.join(answer.cache, answer.read)
                    answer.cache = None
                    self._rows.append(answer)
            except Exception as error:
                answer.fail(error)

    def _read_piece(self, answer: Answer, most: int) -> int:
        """Read at most so many tokens of a prompt, up to the one before its last, and return their number."""
        prompt = answer.prompt[:-1]
        found, shared = self.prefixes.find(prompt)
        if found is not None and len(found.tokens) > answer.read:
            answer.read = len(found.tokens)
            answer.cache = found.cache if answer.read == len(prompt) else copy.deepcopy(found.cache)
        begin, end = answer.read, min(answer.read + most, len(prompt))
        if begin == end:
            return 0
        stored = 0 if found is None else len(found.tokens)
        if stored + FEWEST_SHARED <= shared and begin < shared < end:
            end = shared
        if answer.cache is None:
            answer.cache = LogLinearCache(self.model.config)
        piece = torch.from_numpy(prompt[None, begin:end]).to(self.model.device, torch.int64)
        self.model.model(input_ids=piece, past_key_values=answer.cache, use_cache=True)
        answer.read = end
        if end == len(prompt):
            self.prefixes.store(prompt, answer.cache)  # which no piece will change
        elif end == shared and self.prefixes.most_bytes:
            self.prefixes.store(prompt[:end], copy.deepcopy(answer.cache))
        return end - begin

    def _step(self) -> None:
        """Take one token of each row, and let the rows that end leave."""
        if not self._rows:
            return
        tokens = torch.tensor([answer.last for answer in self._rows], device=self.model.device)
        logits = self.slots.step(tokens)
        likeliest = logits.float().argmax(-1).tolist()
        for row in reversed(range(len(self._rows))):  # the last row moves into the place of one that leaves
            answer = self._rows[row]
            try:
                token = likeliest[row] if answer.is_plain else answer.choose(logits[row : row + 1])
                is_last = answer.append(token)
            except Exception as error:
                answer.fail(error)
                is_last = True
            if is_last or answer.future.cancelled():
                self._leave(row)

    def _leave(self, row: int) -> None:
        """Free a row, and keep its state for sequences that begin like it."""
        answer = self._rows[row]
        if not answer.future.done():
            if self.prefixes.most_bytes:
                self.prefixes.store(answer.tokens_read(), self.slots.copy_of(row))
            answer.finish()
        self.slots.leave(row)
        self._rows[row] = self._rows[-1]
        self._rows.pop()

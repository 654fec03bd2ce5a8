"""Callbacks of the Trainer: metrics.jsonl with the progress bar, and an early stop with a checkpoint."""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loglinear import signals
from loglinear.data.packing import PackedRows
from loglinear.runs.metrics import append_metrics


def bits_per_byte(nats_per_token: float, rows: PackedRows, which: range) -> float:
    """Return the mean loss of some rows in bits per byte of predicted text.

    Raises ValueError if they predict no text.
    """
    tokens, size = rows.predicted(which)
    if size == 0:
        raise ValueError("a batch holds no text to predict: raise --batch-tokens, or give longer documents")
    return nats_per_token * tokens / math.log(2) / size


class RunLog(TrainerCallback):
    """A callback that appends a line to metrics.jsonl for every step and validation, and draws a progress bar.

    A line has step, split ("train" or "validation"), loss (nats per predicted token) and bits_per_byte (the same nats
    per byte of these tokens, as in `loglinear.evaluation`). A line of training also has learning_rate, grad_norm,
    tokens (in all steps so far), seconds (in all training steps so far, without validation and saving),
    tokens_per_second and, on a GPU, peak_bytes (of its memory, in this process). `before` holds the lines of earlier
    steps.
    """

    def __init__(
        self,
        out: Path,
        *,
        before: list[dict[str, Any]],
        steps: int,
        training: PackedRows,
        validation: PackedRows,
        label: str,
        progress: bool,
    ) -> None:
        self.out, self.steps, self.label, self.progress = out, steps, label, progress
        self.training, self.validation = training, validation
        self.rows_per_step = len(training) // steps
        self.batch_tokens = self.rows_per_step * training.row_tokens
        self.seconds = max((record["seconds"] for record in before if "seconds" in record), default=0.0)
        self.step_began = 0.0
        self.validation_bits: float | None = None
        self.bar: tqdm | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = tqdm(
            total=self.steps,
            initial=state.global_step,
            desc=self.label,
            unit="step",
            disable=not self.progress,
            dynamic_ncols=True,
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        state.log_history.clear()  # metrics.jsonl has it, and it would make every checkpoint grow
        logs = logs or {}
        if "loss" in logs:
            self._log_training(state.global_step, logs)
        elif "eval_loss" in logs:
            self.validation_bits = bits_per_byte(logs["eval_loss"], self.validation, range(len(self.validation)))
            self._append(
                step=state.global_step,
                split="validation",
                loss=logs["eval_loss"],
                bits_per_byte=self.validation_bits,
            )

    def _log_training(self, step: int, logs: dict[str, float]) -> None:
        seconds = max(time.perf_counter() - self.step_began, 1e-9)  # reading the loss has waited for the GPU
        self.seconds += seconds
        rate = self.batch_tokens / seconds
        rows = range((step - 1) * self.rows_per_step, step * self.rows_per_step)
        bits = bits_per_byte(logs["loss"], self.training, rows)
        if not math.isfinite(logs["loss"]):
            raise ValueError(f"the loss became {logs['loss']} at step {step}: lower the learning rate (--lr)")
        self._append(
            step=step,
            split="train",
            loss=logs["loss"],
            bits_per_byte=bits,
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            tokens=step * self.batch_tokens,
            seconds=round(self.seconds, 3),
            tokens_per_second=round(rate),
            **({"peak_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}),
        )
        if self.bar is not None:
            shown = {"loss": f"{logs['loss']:.3f}", "bits/byte": f"{bits:.3f}", "tok/s": f"{rate:,.0f}"}
            if self.validation_bits is not None:
                shown["val bits/byte"] = f"{self.validation_bits:.3f}"
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.bar.n)

    def _append(self, **record: Any) -> None:
        append_metrics(self.out, record)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the progress bar."""
        if self.bar is not None:
            self.bar.close()


class StopEarly(TrainerCallback):
    """A callback that saves a checkpoint and ends the training after the current step, on a signal or after minutes.

    The minutes count from the construction. As a context it handles SIGINT, SIGTERM and SIGHUP. A second SIGINT goes to
    the previous handler, which stops at once: an unfinished checkpoint is dropped, and earlier ones stay whole. Other
    signals have no effect when repeated.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self.signal: int | None = None  # the first one
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopEarly:
        self._previous = signals.install(self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        signals.restore(self._previous)

    def _request(self, number: int, frame: object) -> None:
        if self.signal is None:
            self.signal = number
            signals.say("stopping after this step and saving; Ctrl-C again stops at once, at the last checkpoint")
        elif number == signal.SIGINT:
            handler = self._previous[number]
            if not callable(handler):
                raise KeyboardInterrupt
            handler(number, frame)

    @property
    def is_due(self) -> bool:
        """True after a signal or after the minutes."""
        return self.signal is not None or time.monotonic() >= self.deadline

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if _anywhere(self.is_due) and state.global_step < state.max_steps:
            control.should_save = True  # after this step's validation, if it is due: a resumed run would not repeat it
            control.should_training_stop = True


def _anywhere(flag: bool) -> bool:
    """Return True if `flag` is set in any process of the training, so that all stop at the same step."""
    if not torch.distributed.is_initialized():
        return flag
    flags: list[bool | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(flags, flag)
    return any(flags)

"""transformers' Trainer with checkpoints that appear whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from loglinear.training.checkpoints import checkpoints, defect, step_of
from loglinear.training.files import sync, writing
from loglinear.training.manifest import write_manifest
from loglinear.training.run_folder import STAGING


def quiet() -> None:
    """No warnings of transformers, and none of its bars, of writing weights: there is a bar of our own."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def training_arguments(out: Path, **own: Any) -> TrainingArguments:
    """What the trainings of this library have in common: items of the data are whole batches, AdamW in one kernel,
    bfloat16 where there is a GPU, and no output of transformers' own. `own` are those of one training."""
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        optim="adamw_torch_fused",
        use_cpu=not on_gpu,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,  # it would wait for the loss
        eval_strategy="steps",
        save_strategy="steps",
        disable_tqdm=True,
        **{"report_to": [], "bf16": on_gpu and torch.cuda.is_bf16_supported(), **own},
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process trains on one GPU; more would mean nn.DataParallel
    return arguments


def _only_item(items: list[Any], prepare: Callable[[Any], Any] | None = None) -> Any:
    (item,) = items
    return item if prepare is None else prepare(item)


class LogLinearTrainer(Trainer):
    """The Trainer of transformers with one of its steps replaced, quiet, for data whose items are batches.

    `prepare` is what the loader does with every item. `run_files` are files of the run that a checkpoint belongs to and
    that only grow: it is of use only beside them as they are when it is saved.
    """

    _staging: Path | None = None

    def __init__(
        self, *, prepare: Callable[[Any], Any] | None = None, run_files: Sequence[Path] = (), **options: Any
    ) -> None:
        super().__init__(data_collator=partial(_only_item, prepare=prepare), **options)
        self.run_files = run_files
        self.remove_callback(PrinterCallback)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Without the logits of a whole row where only its loss is asked for."""
        if prediction_loss_only:
            inputs = {**inputs, "skip_logits": True}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write beside the checkpoints, then rename: a kill or a power cut leaves the previous ones whole.

        Raises OSError, in one line, where the disk refuses; nothing is left of what could not be finished.
        """
        out = Path(self.args.output_dir or ".")
        final = out / f"checkpoint-{self.state.global_step}"
        if defect(final, resumable=True) is None:  # a run that was stopped at the very step it resumed from
            return
        with writing(final):
            try:
                self._write_checkpoint(model, trial, out / STAGING, final)
            finally:
                self._staging = None
                if self.args.should_save:
                    shutil.rmtree(out / STAGING, ignore_errors=True)
        if self.args.should_save and self.args.save_total_limit is not None:
            # Newer ones are not whole, or this run would have gone on from them: they do not count.
            past = [path for path in checkpoints(out) if step_of(path) <= self.state.global_step]
            for old in past[: -self.args.save_total_limit]:
                shutil.rmtree(old)

    def _write_checkpoint(self, model: nn.Module, trial: Any, staging: Path, final: Path) -> None:
        self._staging = staging
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # what a kill left behind
            staging.mkdir()
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(staging / final.name, self.run_files)
            shutil.rmtree(final, ignore_errors=True)  # a broken one
            (staging / final.name).rename(final)
            sync(final.parent)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with _loading(resume_from_checkpoint, "weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _loading(checkpoint, "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _loading(checkpoint, "state of random numbers"):
            super()._load_rng_state(checkpoint)


@contextmanager
def _loading(checkpoint: str | None, what: str) -> Iterator[None]:
    """One line for a part of a checkpoint that had no manifest to check it with: damage raises anything at all."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"checkpoint {checkpoint} cannot be resumed: its {what} cannot be loaded: {error}") from error

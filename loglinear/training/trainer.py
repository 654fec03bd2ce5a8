"""transformers' Trainer with checkpoints that appear whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from loglinear.models import LogLinearForCausalLM
from loglinear.runs.checkpoints import checkpoints, defect, step_of
from loglinear.runs.files import sync, writing
from loglinear.runs.folder import STAGING
from loglinear.runs.manifest import write_manifest
from loglinear.training.graphs import Batch, Graphs
from loglinear.training.lost import loss_of_process
from loglinear.training.sequences import Repeated, own_slice, sequence_mesh
from loglinear.training.sharded import ShardedTrainer


def quiet() -> None:
    """Silence the warnings and progress bars of transformers; `RunLog` draws one bar."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def training_arguments(out: Path, **own: Any) -> TrainingArguments:
    """Return the arguments that all trainings of this library share, with `own` over them.

    Items of the data are whole batches, AdamW is one kernel, a GPU computes in bfloat16 if it can, and transformers
    prints nothing. Raises ValueError if a configuration of accelerate says another precision.
    """
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        optim="adamw_torch_fused",
        use_cpu=not on_gpu,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,  # the filter would wait for the loss
        eval_strategy="steps",
        save_strategy="steps",
        disable_tqdm=True,
        log_level_replica="error",  # of the other processes, which would warn by default
        # Every forward uses every parameter, also one of padding alone, so nobody needs to look for others.
        ddp_find_unused_parameters=False,
        **{"report_to": [], "bf16": on_gpu and torch.cuda.is_bf16_supported(), **own},
    )
    expected = "bf16" if arguments.bf16 else "no"
    if arguments.mixed_precision != expected:
        raise ValueError(
            f"the configuration of accelerate has mixed_precision: {arguments.mixed_precision}, and this run computes "
            f"in {'bfloat16' if arguments.bf16 else 'float32'}: set 'no' there, and choose by --dtype"
        )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process trains on one GPU; more would be nn.DataParallel
    return arguments


def _only_item(items: list[Any], prepare: Callable[[Any], Any] | None = None) -> Any:
    (item,) = items
    return item if prepare is None else prepare(item)


class WholeCheckpoints(ShardedTrainer):
    """A base class for any Trainer, with checkpoints that appear whole.

    `run_files` are the growing files of the run: a checkpoint records how long they are when it is saved, and training
    resumes only with that part intact.
    """

    run_files: Sequence[Path] = ()
    _staging: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint to a staging folder, then rename it: a kill or a power cut leaves earlier ones whole.

        Raises OSError, in one line, if the disk refuses; the unfinished checkpoint is removed.
        """
        out = Path(self.args.output_dir or ".")
        final = out / f"checkpoint-{self.state.global_step}"
        if defect(final, resumable=True) is None:  # the run stopped at the step from which it resumed
            return
        with writing(final):
            try:
                self._write_checkpoint(model, trial, out / STAGING, final)
            finally:
                self._staging = None
                if self.args.should_save:
                    shutil.rmtree(out / STAGING, ignore_errors=True)
        if self.args.should_save and self.args.save_total_limit is not None:
            # Newer ones do not count: they are not whole, or this run would have resumed from them.
            past = [path for path in checkpoints(out) if step_of(path) <= self.state.global_step]
            for old in past[: -self.args.save_total_limit]:
                shutil.rmtree(old)

    def _write_checkpoint(self, model: nn.Module, trial: Any, staging: Path, final: Path) -> None:
        self._staging = staging
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # the remains of a kill
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


class LogLinearTrainer(WholeCheckpoints):
    """The Trainer of transformers for data whose items are batches. The loader applies `prepare` to every item.

    So many consecutive processes as `context_parallel` says share each item, a row of packed documents: each trains on
    one slice of it.
    """

    def __init__(
        self,
        *,
        prepare: Callable[[Any], Any] | None = None,
        run_files: Sequence[Path] = (),
        context_parallel: int = 1,
        **options: Any,
    ) -> None:
        if context_parallel > 1:
            options |= {name: Repeated(options[name], context_parallel) for name in ("train_dataset", "eval_dataset")}
        super().__init__(data_collator=partial(_only_item, prepare=prepare), **options)
        is_cut = context_parallel > 1
        self.sequence_mesh = sequence_mesh(context_parallel, self.args.device.type) if is_cut else None
        self.run_files = run_files
        self.remove_callback(PrinterCallback)

    def compute_loss(self, model: nn.Module, inputs: Any, *rest: Any, **options: Any) -> Any:
        """Return the loss of a batch, equal on all processes that share it.

        The Trainer counts the targets of a shared batch on each of its processes, and the gradient of each is that of
        its own tokens times their number. Both factors cancel.
        """
        if self.sequence_mesh is not None:
            assert self.model is not None
            inputs = own_slice(self.model.config, self.sequence_mesh, inputs)
        return super().compute_loss(model, inputs, *rest, **options)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Skip the logits of a row if only its loss is needed."""
        if prediction_loss_only and isinstance(self.model, LogLinearForCausalLM):
            inputs = {**inputs, "skip_logits": True}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)


class GraphTrainer(LogLinearTrainer):
    """A trainer whose forward and backward pass can be one CUDA graph. A step is one batch, of one of few shapes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        assert isinstance(self.model, nn.Module)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.forward_backward: Callable[[Batch], Sequence[Tensor | None]] | None = None

    def record_graphs(self) -> None:
        """Run the forward and backward pass of every later step as one CUDA graph."""
        self.forward_backward = Graphs(self._loss_and_gradients)

    def _loss_and_gradients(self, batch: Batch) -> tuple[Tensor | None, ...]:
        loss = cast(Tensor, self.compute_loss(self.model, batch))  # type: ignore[arg-type]
        return loss.detach(), *torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Return the loss of a batch, with the gradients in the parameters."""
        if self.forward_backward is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        loss, *gradients = self.forward_backward(self._prepare_inputs(inputs))
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return cast(Tensor, loss)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0. Nothing reads this count, and the Trainer's method would walk over all modules in every step."""
        return 0


@contextmanager
def _loading(checkpoint: str | None, what: str) -> Iterator[None]:
    """Turn any error of loading a part into one line. Without a manifest, damage can raise any type."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if loss_of_process(error) is not None:
            raise
        raise ValueError(f"checkpoint {checkpoint} cannot be resumed: its {what} cannot be loaded: {error}") from error

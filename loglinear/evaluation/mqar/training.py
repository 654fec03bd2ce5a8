"""One cell of the table: trained with transformers' Trainer, stopped and resumed exactly, and tested."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from loglinear.evaluation.mqar.batches import (
    SPLITS,
    RecallBatch,
    Scores,
    recall_batches,
    recall_counts,
    recall_loss,
    recall_scores,
)
from loglinear.evaluation.mqar.cells import RecallCell, RecallTask, TrainingProtocol
from loglinear.evaluation.mqar.folder import Result, begin, finish
from loglinear.models import LogLinearForCausalLM
from loglinear.runs.checkpoints import last_checkpoint
from loglinear.runs.provenance import command, versions
from loglinear.training.compilation import compile_blocks
from loglinear.training.graphs import Graphs
from loglinear.training.trainer import GraphTrainer, quiet, training_arguments


class Flag(Protocol):
    """A request to stop the training: an event of `threading` or of `multiprocessing`."""

    def is_set(self) -> bool: ...


@cache
def _batches(task: RecallTask, split: str, device: str) -> list[RecallBatch]:
    """Return the batches of a split, which a process makes once for all its cells."""
    return recall_batches(task, split, device)


def run_cell(cell: RecallCell, out: Path, stop: Flag, *, compile: bool = False) -> Result | None:
    """Train or resume a cell, test it, and write and return its result. Return None if `stop` was set before its end.

    A stopped cell resumes exactly, bit for bit on the CPU. With `compile` the training compiles the model's blocks,
    once for each length of examples; validation and test never do.

    Raises ValueError if `out` holds checkpoints of this cell with another task.
    """
    if stop.is_set():
        return None
    quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = begin(out, cell)
    training, validation, test = (_batches(cell.task, split, device) for split in SPLITS)
    set_seed(cell.seed)
    model = cell.build()
    if cell.task.how.torch_init:
        initialise_as_torch(model)
    course = Course(stop, cell.task.good_enough)
    trainer = RecallTrainer(
        protocol=cell.task.how,
        model=model,
        args=_arguments(cell, folder, len(training)),
        train_dataset=training,  # type: ignore[arg-type]  # a list of batches is one
        eval_dataset=validation,  # type: ignore[arg-type]
        callbacks=[course],
    )
    if compile:
        trainer.compile_blocks(f"{cell.model} {cell.dim}")
    if device == "cuda":
        trainer.record_graphs()
    checkpoint = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if course.stopped:
        return None
    result: Result = {
        "cell": cell.to_dict(),
        "parameters": model.num_parameters(),
        **_costs(trainer, course.seconds, len(training)),
        "compiled": compile,
        **_accuracies("validation", trainer.scores(validation)),
        **_accuracies("test", trainer.scores(test)),
        "course": course.records(trainer.state),
        "versions": versions(),
        "command": command(),
    }
    finish(out, cell, result)
    return result


def _accuracies(split: str, scores: Scores) -> dict[str, Any]:
    by_pairs = {str(pairs): accuracy for pairs, accuracy in scores.accuracy.items()}
    return {f"{split}_accuracy": scores.mean, f"{split}_accuracy_by_pairs": by_pairs}


def _costs(trainer: RecallTrainer, seconds: float, steps_per_epoch: int) -> dict[str, Any]:
    steps = trainer.state.global_step
    return {
        "epochs": steps // steps_per_epoch,
        "steps": steps,
        "seconds": round(seconds, 2),
        "precision": "bfloat16 autocast" if trainer.args.bf16 else "float32",
    }


@torch.no_grad()
def initialise_as_torch(model: LogLinearForCausalLM) -> None:
    """Give the linear maps of the layers PyTorch's initial values, and divide outputs by the root of the layers.

    Linear maps that start at zero still do: with them the model starts as the linear model.
    """
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear) and not hasattr(module, "initial_values"):
            module.reset_parameters()
            if name.endswith("out_proj"):
                module.weight /= math.sqrt(len(model.model.layers))


class RecallTrainer(GraphTrainer):
    """A Trainer whose items are batches. It computes vocabulary logits only at the queries."""

    compiled: ClassVar[str | None] = None  # the kind of model whose graphs the compiler holds, in this process

    def __init__(self, *, protocol: TrainingProtocol, **options: Any) -> None:
        self.protocol = protocol
        super().__init__(**options)
        self.counts: Callable[[Any], Tensor] = self._counts
        self.uncompiled: Callable[[], AbstractContextManager[Any]] = nullcontext

    def compile_blocks(self, kind: str) -> None:
        """Compile the blocks for every length of training examples. Models of one `kind` share the compiled graphs."""
        if RecallTrainer.compiled != kind:
            torch._dynamo.reset()
            RecallTrainer.compiled = kind
        compile_blocks(self.model, dynamic=False)  # type: ignore[arg-type]
        self.uncompiled = partial(torch.compiler.set_stance, "force_eager")

    def record_graphs(self) -> None:
        """From now on the forward and backward pass of a step is one CUDA graph, and so is a validation batch."""
        super().record_graphs()
        evaluation = Graphs(lambda batch: (self._counts(batch),))
        self.counts = lambda batch: cast(Tensor, evaluation(batch)[0])

    def _counts(self, batch: Any) -> Tensor:
        with self.accelerator.autocast(), self.uncompiled():
            return recall_counts(self.model, batch)  # type: ignore[arg-type]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return all parameters if the protocol decays all, otherwise those of the Trainer."""
        if self.protocol.decay_all:
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """Return the cosine to zero, which falls once an epoch if the protocol wants that."""
        if self.lr_scheduler is None and self.protocol.by_epoch:
            optimizer = self.optimizer if optimizer is None else optimizer
            epochs, steps = int(self.args.num_train_epochs), int(self.args.save_steps)
            self.lr_scheduler = LambdaLR(optimizer, partial(_cosine_by_epoch, epochs=epochs, steps=steps))
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: RecallBatch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        with self.accelerator.autocast():  # `accelerate` wraps it only around the forward of the whole model
            return recall_loss(model, inputs)  # type: ignore[arg-type]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Log accuracy and loss on the validation batches, pass them to the callbacks and return them."""
        scores = self.scores(self.eval_dataset)
        metrics = {"eval_accuracy": scores.mean, "eval_loss": scores.loss}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def scores(self, batches: Any) -> Scores:
        """Return the scores of the model in the precision of its training."""
        assert isinstance(self.model, LogLinearForCausalLM)
        self.model.eval()
        return recall_scores(self.counts, batches)


def _cosine_by_epoch(step: int, *, epochs: int, steps: int) -> float:
    return (1 + math.cos(math.pi * (step // steps) / epochs)) / 2


class Course(TrainerCallback):
    """A callback that ends the training of a cell at the accuracy `good_enough`, or with a checkpoint on request.

    It adds the seconds so far to the log of the Trainer's state, which is part of every checkpoint.
    """

    def __init__(self, stop: Flag, good_enough: float) -> None:
        self.stop, self.good_enough = stop, good_enough
        self.stopped = False
        self.began, self.seconds_before = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """The seconds of training and validation, over all resumed parts of this cell."""
        return self.seconds_before + time.perf_counter() - self.began

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.seconds_before = max((record.get("seconds", 0.0) for record in state.log_history), default=0.0)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Not at a step with validation, which decides by itself if training continues.
        if self.stop.is_set() and not control.should_evaluate:
            self.stopped = control.should_save = control.should_training_stop = True
            state.log_history.append({"step": state.global_step, "seconds": self.seconds})

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        record = state.log_history[-1]
        record["seconds"] = self.seconds
        if record["eval_accuracy"] > self.good_enough:
            control.should_training_stop = True
            control.should_save = False  # a run that resumed from here would train on

    @staticmethod
    def records(state: TrainerState) -> list[dict[str, float]]:
        """Return the validation after each epoch."""
        return [
            {"step": record["step"], "accuracy": record["eval_accuracy"], "loss": record["eval_loss"]}
            for record in state.log_history
            if "eval_accuracy" in record
        ]


def _arguments(cell: RecallCell, folder: Path, steps_per_epoch: int) -> TrainingArguments:
    task = cell.task
    return training_arguments(
        folder,
        num_train_epochs=task.epochs,
        learning_rate=cell.learning_rate,
        adam_beta1=task.adam_betas[0],
        adam_beta2=task.adam_betas[1],
        weight_decay=task.weight_decay,
        max_grad_norm=task.how.max_grad_norm,
        **({"bf16": False} if task.how.float32 else {}),
        lr_scheduler_type="cosine",
        warmup_steps=0,
        seed=cell.seed,
        dataloader_pin_memory=False,  # batches are on the device already
        logging_strategy="no",  # logging would wait for the loss of a step
        eval_steps=steps_per_epoch,
        save_steps=steps_per_epoch,
        save_total_limit=1,
    )

"""One training run, from a recipe to checkpoints, metrics.jsonl and run.json."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from loglinear.data.corpus import Corpus, load_corpus
from loglinear.data.packing import EqualRows, PackedRows
from loglinear.data.tokenizer import load_tokenizer
from loglinear.models import LogLinearConfig
from loglinear.processes import is_main_process, world_size
from loglinear.recipes import TrainingRecipe
from loglinear.runs.checkpoints import last_checkpoint, step_of
from loglinear.runs.folder import check_same_data, check_same_recipe, claim, require_empty, write_run
from loglinear.runs.metrics import METRICS_FILE, rewind_metrics
from loglinear.training.callbacks import RunLog, StopEarly
from loglinear.training.compilation import GraphSteps, compile_blocks, in_few_sizes, require_compiler
from loglinear.training.lost import together
from loglinear.training.sequences import require_sliceable, sequence_groups
from loglinear.training.start import prepare_to_resume, starting_config, starting_model, trained_share
from loglinear.training.trainer import GraphTrainer, quiet, training_arguments


@dataclass(frozen=True)
class TrainingResult:
    """The state of a run after `train`."""

    checkpoint: Path
    step: int  # of the last checkpoint
    interrupted: bool  # True if minutes or a signal ended it early, or a signal came to this process in the last step
    signal: int | None = None  # the signal, if one came to this process
    was_finished: bool = False  # True if it had taken its last step before, so that nothing was trained


def train(
    recipe: TrainingRecipe,
    out: Path,
    *,
    resume: bool = False,
    minutes: float | None = None,
    tensorboard: bool = False,
    progress: bool = True,
    label: str | None = None,
    corpora: tuple[Corpus, Corpus] | None = None,
    equal_rows: bool = False,
    context_parallel: int = 1,
) -> TrainingResult:
    """Train `recipe` into the folder `out`, or continue the run in it.

    A resumed run gives the loss curve of an uninterrupted one, bit for bit on the CPU. During training SIGINT, SIGTERM
    and SIGHUP save a checkpoint at the end of the current step and stop. So do `minutes`, which include reading the
    data. A signal that this process ignores (nohup) stays ignored. With several processes (torchrun, accelerate
    launch) every process calls this function. `label` names the progress bar. `corpora` are the texts of the recipe's
    data, for training and validation, if the caller has read them already. With `equal_rows` every document must have
    `seq_len` tokens, and a row is a batch of documents. On one GPU the forward and backward pass of a step is then one
    CUDA graph, without a compiler. So many consecutive processes as `context_parallel` says share each row: each holds
    one slice of it (`loglinear.parallel`).

    Raises ValueError for unusable data, an unusable tokenizer or folder, and if the loss stops being finite. Raises
    ValueError also if `equal_rows` or `context_parallel` does not fit the documents or the recipe. Raises OSError if a
    checkpoint or a line of metrics cannot be written, and LostProcess, which is an OSError too, if another process has
    ended.
    """
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes must be positive, got {minutes}")
    recipe.require_complete()
    if resume:
        check_same_recipe(out, recipe)
    if equal_rows:
        _require_whole_steps(recipe)
    config = starting_config(recipe)
    groups = sequence_groups(context_parallel)
    if context_parallel > 1:
        require_sliceable(recipe, equal_rows=equal_rows)
    stop = StopEarly(minutes)
    quiet()
    main_process = is_main_process()
    with claim(out) if main_process else contextlib.nullcontext():
        if main_process and not resume:
            require_empty(out)
        arguments = _arguments(recipe, out, groups, tensorboard)
        if recipe.compile:
            require_compiler(arguments.device)
        tokenizer = load_tokenizer(recipe.tokenizer or "bytes", config.vocab_size)
        if corpora is None:
            shown = progress and main_process
            corpora = load_corpus(recipe.data, tokenizer, recipe.validation_fraction, progress=shown)
        kind = EqualRows if equal_rows else PackedRows
        training = _training_rows(recipe, corpora[0], groups, kind)
        validation = _validation_rows(recipe, corpora[1], kind)
        set_seed(recipe.seed)
        model = starting_model(recipe, config)
        if recipe.checkpointing:
            _checkpoint_activations(model)
        facts = _data_facts(*corpora)
        if resume:
            check_same_data(out, facts)
        elif main_process:
            write_run(out, recipe, facts, parameters=model.num_parameters(), model=model.config)
        for note in (trained_share(model), _untrained_levels(recipe, config)) if progress and main_process else ():
            if note is not None:
                print(note, file=sys.stderr)
        checkpoint = last_checkpoint(out) if resume else None
        if checkpoint is not None:
            prepare_to_resume(checkpoint, recipe, model)
        before = rewind_metrics(out, checkpoint) if main_process else []
        if checkpoint is not None and step_of(checkpoint) >= recipe.steps:
            return TrainingResult(checkpoint, recipe.steps, interrupted=False, was_finished=True)

        log = RunLog(
            out,
            before=before,
            steps=recipe.steps,
            training=training,
            validation=validation,
            label=label or recipe.name,
            progress=progress and main_process,
        )
        # Checkpointing reads the state of random numbers in each block, which no graph can record.
        can_record = _can_record(arguments.device) and not recipe.checkpointing
        graphs = recipe.compile and can_record
        if recipe.compile:
            compile_blocks(model, cuda_graphs=graphs)
        trainer = GraphTrainer(
            model=model,
            args=arguments,
            train_dataset=training,
            eval_dataset=validation,
            processing_class=tokenizer,
            callbacks=[stop, *([log] if main_process else []), *([GraphSteps()] if graphs else [])],
            prepare=in_few_sizes if graphs else None,
            run_files=[out / METRICS_FILE],
            context_parallel=context_parallel,
        )
        if equal_rows and can_record:
            trainer.record_graphs()
        with stop, contextlib.closing(log), _one_thread_beside(arguments.device), together(out):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        step = trainer.state.global_step
        interrupted = step < recipe.steps or stop.signal is not None
        return TrainingResult(out / f"checkpoint-{step}", step, interrupted, stop.signal)


def _untrained_levels(recipe: TrainingRecipe, config: LogLinearConfig) -> str | None:
    """Return a note if training never reaches some levels of the model: longer sequences would read them untrained."""
    trained, levels = config.partition.num_columns(recipe.seq_len + (recipe.jitter or 1) - 1), config.num_levels
    if trained >= levels or "linear_attention" not in (config.layer_types or ()):
        return None
    if config.routing is not None:  # a bucket that training never saw has its score, whose factor all buckets share
        return None
    hint = f". Set num_levels to {trained} to leave them out." if recipe.start is None else ""
    starts = f" that start below {recipe.jitter:,}" if recipe.jitter else ""
    return (
        f"note: sequences of {recipe.seq_len:,} tokens{starts} train {trained} of {levels} levels; "
        f"longer ones would read the others untrained{hint}"
    )


def _checkpoint_activations(model: Any) -> None:
    """Let a model compute each block again in the backward pass."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)()  # the older name warns in newer versions of transformers


def _can_record(device: torch.device) -> bool:
    """Return True if training can use CUDA graphs: on one GPU, because other processes would wait for gradients."""
    return device.type == "cuda" and world_size() == 1


@contextlib.contextmanager
def _one_thread_beside(device: torch.device) -> Iterator[None]:
    """Use one CPU thread beside a GPU. Waking 32 cores to copy small rows took 40 ms of a step."""
    threads = torch.get_num_threads()
    try:
        if device.type != "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def _accumulation(recipe: TrainingRecipe, groups: int) -> int:
    """Return the number of forward passes of each process, or group of processes, in one optimiser step."""
    step_tokens = recipe.row_tokens * groups
    if recipe.batch_tokens % step_tokens:
        raise ValueError(
            f"batch_tokens must be a multiple of micro_batch_tokens times processes, got {recipe.batch_tokens} and "
            f"{recipe.row_tokens} x {groups}"
        )
    return recipe.batch_tokens // step_tokens


def _require_whole_steps(recipe: TrainingRecipe) -> None:
    """Raise ValueError unless a step of the recipe is one row of an uncompiled model."""
    if recipe.compile:
        raise ValueError("batches of whole documents are recorded without a compiler: use --no-compile")
    if recipe.row_tokens != recipe.batch_tokens:
        raise ValueError(
            f"a step on whole documents is one row: leave out micro_batch_tokens = {recipe.micro_batch_tokens}"
        )


def _training_rows(recipe: TrainingRecipe, corpus: Corpus, groups: int, kind: type[PackedRows]) -> PackedRows:
    rows = recipe.steps * _accumulation(recipe, groups) * groups
    sizes = dict(seq_len=recipe.seq_len, row_tokens=recipe.row_tokens, rows=rows)
    return kind(corpus, shuffle_seed=recipe.seed, jitter=recipe.jitter, **sizes)


def _validation_rows(recipe: TrainingRecipe, corpus: Corpus, kind: type[PackedRows]) -> PackedRows:
    rows = kind(corpus, seq_len=recipe.seq_len, row_tokens=recipe.row_tokens, shuffle_seed=None)
    rows.rows = min(rows.rows, max(1, recipe.eval_tokens // recipe.row_tokens))
    if rows.predicted(range(len(rows)))[1] == 0:
        raise ValueError("the validation text is too short to predict any of it: give more data")
    return rows


def _data_facts(training: Corpus, validation: Corpus) -> dict[str, Any]:
    return {
        name: {"documents": len(corpus.names), "tokens": len(corpus.tokens), "fingerprint": corpus.fingerprint}
        for name, corpus in (("train", training), ("validation", validation))
    }


def _arguments(recipe: TrainingRecipe, out: Path, groups: int, tensorboard: bool) -> TrainingArguments:
    if tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs the tensorboard package: pip install 'loglinear[tensorboard]'")
    return training_arguments(
        out,
        max_steps=recipe.steps,
        gradient_accumulation_steps=_accumulation(recipe, groups),
        learning_rate=recipe.learning_rate,
        adam_beta1=recipe.adam_betas[0],
        adam_beta2=recipe.adam_betas[1],
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.final_lr_ratio},
        warmup_steps=recipe.warmup_steps,
        seed=recipe.seed,
        train_sampling_strategy="sequential",  # PackedRows shuffles
        label_names=["labels"],
        prediction_loss_only=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=1,  # an average over steps would not be exact after a resume
        eval_steps=recipe.eval_every,
        save_steps=recipe.save_every,
        save_total_limit=recipe.keep_checkpoints,
        **({} if recipe.dtype is None else {"bf16": recipe.dtype == "bfloat16"}),
        report_to=["tensorboard"] if tensorboard else [],
        use_cache=True,  # the Trainer writes this into the model's configuration; a loss builds no cache
    )

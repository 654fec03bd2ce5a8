"""Rounds of reinforcement learning with TRL's GRPOTrainer. A run can stop and resume after every round."""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from experiments.countdown import Countdown, Problem
from experiments.recipes.rl import ALL, LOWEST, Reinforcement
from loglinear.models import ByteTokenizer
from loglinear.runs.checkpoints import last_checkpoint
from loglinear.runs.folder import RUN_FILE, claim, require_empty
from loglinear.runs.json_files import read_sealed, write_sealed
from loglinear.runs.metrics import METRICS_FILE, append_metrics, rewind_metrics
from loglinear.runs.provenance import command, versions
from loglinear.training import TrainingResult, load_model
from loglinear.training.callbacks import StopEarly
from loglinear.training.trainer import WholeCheckpoints, quiet

HELD_OUT = "held_out"  # the split of a test's line in metrics.jsonl
LOGGED = {  # our name of each of TRL's metrics
    "reward": "reward",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "completions/clipped_ratio": "cut_off",
    "frac_reward_zero_std": "groups_without_difference",
    "clip_ratio/region_mean": "clipped",
    "grad_norm": "grad_norm",
}


class GroupTrainer(WholeCheckpoints, GRPOTrainer):
    """TRL's trainer and its objective, with checkpoints that appear whole."""


class LowestEntropyTrainer(GroupTrainer):
    """A GroupTrainer of the tokens that `top_entropy_quantile` leaves out. TRL has no option for them."""

    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """Return the mask of an answer's tokens with less entropy than the threshold."""
        return ~super().get_high_entropy_mask(entropies, mask, threshold) & mask.bool()


def solved(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Return the reward of each answer: 1 if it is right and has its end, otherwise 0.

    The text is that of all tokens, as in the tests. TRL's `completions` lack the special tokens inside an answer.
    """
    tokenizer = ByteTokenizer()
    texts = (str(tokenizer.decode(ids[:-1])) for ids in completion_ids)
    return [
        float(ids[-1] == tokenizer.eos_token_id and Problem.from_prompt(prompt).is_solved_by(text))
        for prompt, text, ids in zip(prompts, texts, completion_ids, strict=True)
    ]


class StopAfterRound(StopEarly):
    """A StopEarly that stops at the end of a round, because the answers of an unfinished round are in no checkpoint."""

    def __init__(self, updates: int, minutes: float | None) -> None:
        super().__init__(minutes)
        self.updates = updates

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.updates == 0:
            super().on_step_end(args, state, control, **kwargs)


class RoundLog(TrainerCallback):
    """Append a line to metrics.jsonl for every step and every test, save with every test, and draw a progress bar."""

    def __init__(
        self, out: Path, recipe: Reinforcement, before: list[dict[str, Any]], evaluate: Callable[[Any], dict[str, Any]]
    ) -> None:
        self.out, self.recipe, self.evaluate = out, recipe, evaluate
        self.seconds = max((record["seconds"] for record in before if "seconds" in record), default=0.0)
        self.began = 0.0
        self.bar = tqdm(total=recipe.rounds, desc=recipe.name, unit="round", dynamic_ncols=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.bar.update(state.global_step // self.recipe.updates)
        if state.global_step == 0:
            self._test(0, model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= self._is_due(state.global_step)  # an early stop has asked for it already

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, model: Any = None, **kwargs: Any
    ) -> None:
        state.log_history.clear()  # metrics.jsonl has it, and it would make every checkpoint grow
        if not logs or "entropy" not in logs:  # the summary at the end
            return
        step = state.global_step
        self.seconds += time.perf_counter() - self.began
        known = {name: logs[theirs] for theirs, name in LOGGED.items() if logs.get(theirs) is not None}
        append_metrics(self.out, {"step": step, "split": "train", **known, "seconds": round(self.seconds, 3)})
        if step % self.recipe.updates == 0:
            self.bar.update(step // self.recipe.updates - self.bar.n)
        if self._is_due(step):
            self._test(step, model)

    def _is_due(self, step: int) -> bool:
        round_, rest = divmod(step, self.recipe.updates)
        return rest == 0 and (round_ % self.recipe.evaluate_every == 0 or round_ == self.recipe.rounds)

    def _test(self, step: int, model: Any) -> None:
        measured = self.evaluate(model)
        self.bar.set_postfix(accuracy=f"{measured['accuracy']:.3f}", length=f"{measured['length']:.1f}")
        append_metrics(self.out, {"step": step, "split": HELD_OUT, **measured})

    def close(self) -> None:
        """Close the progress bar."""
        self.bar.close()


def reinforce(
    recipe: Reinforcement, out: Path, evaluate: Callable[[Any], dict[str, Any]], *, minutes: float | None = None
) -> TrainingResult:
    """Start or resume the rounds of a recipe in the folder `out`; `evaluate` tests a model on held-out problems.

    A resumed run gives the numbers of an uninterrupted run, bit for bit on the CPU. After a signal, or after `minutes`,
    the call saves a checkpoint at the end of the round and returns. Raises ValueError if `out` holds a run of another
    recipe.
    """
    stop = StopAfterRound(recipe.updates, minutes)
    quiet()
    disable_progress_bars()
    with claim(out):
        _begin(recipe, out)
        checkpoint = last_checkpoint(out)
        set_seed(recipe.seed)
        log = RoundLog(out, recipe, rewind_metrics(out, checkpoint), evaluate)
        with contextlib.closing(log), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TRL uses names that transformers will drop
            trainer = make_trainer(recipe, out, [stop, log])
            with stop:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        step = trainer.state.global_step
        interrupted = step < recipe.steps or stop.signal is not None
        return TrainingResult(out / f"checkpoint-{step}", step, interrupted, stop.signal)


def _begin(recipe: Reinforcement, out: Path) -> None:
    """Write run.json, or raise ValueError if it holds another recipe. The message names the difference."""
    if not (out / RUN_FILE).exists():
        require_empty(out)
        write_sealed(out / RUN_FILE, {"recipe": recipe.to_dict(), "versions": versions(), "command": command()})
        return
    theirs, ours = read_sealed(out / RUN_FILE)["recipe"], recipe.to_dict()
    for name in ours | theirs:
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"{out} holds a run with {name} = {theirs.get(name)!r}, which cannot resume with {ours.get(name)!r}"
            )


def make_trainer(recipe: Reinforcement, out: Path, callbacks: list[TrainerCallback]) -> GroupTrainer:
    """Return the trainer of a recipe, with the model that the recipe starts from."""
    on_gpu = torch.cuda.is_available()
    problems = Countdown.from_source(recipe.task).problems(f"rounds {recipe.seed}", held_out=False)
    prompts = [{"prompt": problem.prompt} for problem in itertools.islice(problems, recipe.rounds * recipe.prompts)]
    settings = GRPOConfig(
        output_dir=str(out),
        max_steps=recipe.steps,
        num_generations=recipe.answers,
        per_device_train_batch_size=recipe.prompts * recipe.answers // recipe.updates,
        steps_per_generation=recipe.updates,
        max_completion_length=recipe.longest,
        loss_type="dapo",
        epsilon=recipe.clip[0],
        epsilon_high=recipe.clip[1],
        beta=0.0,
        top_entropy_quantile=1.0 if recipe.tokens == ALL else recipe.quantile,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        generation_kwargs={"use_cache": True},  # the Trainer of transformers switches it off in the configuration
        seed=recipe.seed,
        bf16=False,  # so that answers are sampled from the probabilities that the loss uses
        gradient_checkpointing=False,  # TRL's default saves memory that these models do not need
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="no",  # RoundLog and StopAfterRound save
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
    )
    kind = LowestEntropyTrainer if recipe.tokens == LOWEST else GroupTrainer
    trainer = kind(
        model=load_model(Path(recipe.start), device="cuda" if on_gpu else "cpu"),
        reward_funcs=solved,
        args=settings,
        train_dataset=Dataset.from_list(prompts),
        processing_class=ByteTokenizer(add_bos_token=True),  # as every document of the training began
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.run_files = [out / METRICS_FILE]
    return trainer

"""Reinforcement learning on countdown, in which all tokens learn, or those of highest entropy, or the others.

python -m experiments.rl pretrain --kind log_linear --out runs/rl/log_linear --minutes 9
python -m experiments.rl run --kind log_linear --tokens top20 --base runs/rl/log_linear --out runs/rl/log_linear-top20
python -m experiments.rl show
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer

from experiments.countdown import Countdown, Problem
from experiments.recipes.rl import ALL, KINDS, LOWEST, TOKENS, TOP, Reinforcement, base_recipe, reinforcement
from experiments.results import Result, mean_and_deviation, read_seeds, require_replaceable, require_some, result_file
from experiments.runs import Options, Out, program, train_and_evaluate, with_options
from loglinear.cli import execute
from loglinear.cli.console import Interrupted, print_table
from loglinear.cli.options import COUNT, RATE, SEED, Minutes, of_recipe
from loglinear.data.corpus import Corpus
from loglinear.data.tokenizer import encode_prompt, load_tokenizer
from loglinear.evaluation.padded import padded
from loglinear.models import LogLinearForCausalLM
from loglinear.recipes import TrainingRecipe
from loglinear.runs.checkpoints import resolve, step_of
from loglinear.runs.folder import read_run, require_folder, run_recipe
from loglinear.runs.json_files import write_object
from loglinear.runs.metrics import read_metrics
from loglinear.runs.provenance import command, versions

ROWS = 1024  # answers that are written at once
NAMES = {TOP: "top 20 %", ALL: "all", LOWEST: "lowest 80 %"}

app = program(__doc__)
KindOfModel = Annotated[str, typer.Option(help=f"One of {', '.join(KINDS)}.")]


@app.command()
@with_options
def pretrain(kind: KindOfModel, out: Out, *, options: Options) -> None:
    """Train or resume the model that reinforcement learning starts from, test it, and write rl-base-KIND.json.

    The model reads answers to countdown. Training can stop at any time: the next call resumes it from the last
    checkpoint.

    Example, to repeat until it exits with 0:

    python -m experiments.rl pretrain --kind log_linear --out runs/rl/log_linear --minutes 9
    """
    rounds = reinforcement(kind, ALL, "", miniature=options.miniature)

    def evaluate(model: LogLinearForCausalLM, recipe: TrainingRecipe) -> dict[str, Any]:
        with torch.autocast(model.device.type, enabled=False):  # as in the rounds
            return measure(model, rounds)

    recipe = base_recipe(kind, miniature=options.miniature)
    settings = {"examples": rounds.held_out}
    train_and_evaluate(recipe, out, evaluate, f"rl-base-{kind}", options, eval_settings=settings, corpora=corpora)


def corpora(recipe: TrainingRecipe) -> tuple[Corpus, Corpus]:
    """Return the answers that a recipe and its seed train on, and the answers of its validation."""
    return Countdown.from_source(recipe.data[0]).corpora(recipe.seed)


class Answer(NamedTuple):
    """An answer that a model wrote."""

    text: str
    tokens: int
    """The number of its tokens, with its end."""
    ended: bool
    """False if the answer was cut off."""


@torch.no_grad()
def write_answers(model: Any, problems: Sequence[Problem], longest: int, *, sampled: bool) -> list[Answer]:
    """Return a model's answer to each problem, of at most `longest` tokens: sampled, or of the likeliest tokens."""
    tokenizer = load_tokenizer("bytes")
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    answers = []
    for start in range(0, len(problems), ROWS):
        prompts = [encode_prompt(tokenizer, problem.prompt) for problem in problems[start : start + ROWS]]
        ids, is_token = padded(prompts, model.device, left=True)
        choice = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {"do_sample": False}
        written = model.generate(
            input_ids=ids,
            attention_mask=is_token.long(),
            max_new_tokens=longest,
            eos_token_id=end,
            pad_token_id=pad,
            use_cache=True,
            **choice,
        )
        for row in written[:, ids.shape[1] :].tolist():
            ended = end in row
            body = row[: row.index(end)] if ended else row
            answers.append(Answer(str(tokenizer.decode(body)), len(body) + ended, ended))
    return answers


def measure(model: Any, recipe: Reinforcement) -> dict[str, float]:
    """Return a model's scores on the held-out problems of a recipe, the same for all models and seeds.

    `accuracy` is the share of right answers among all sampled ones, and `greedy` that among the likeliest answers.
    `any` is the share of problems with a right answer among the sampled ones. `length` is the mean number of tokens of
    the sampled answers, and `ended` the share of sampled answers with an end. The caller's random numbers do not
    change.
    """
    asked = Countdown.from_source(recipe.task).test(recipe.held_out)
    repeated = [problem for problem in asked for _ in range(recipe.samples)]
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sampled = write_answers(model, repeated, recipe.longest, sampled=True)
    likeliest = write_answers(model, asked, recipe.longest, sampled=False)
    model.train(was_training)
    right_PS = np.reshape([_right(*pair) for pair in zip(repeated, sampled, strict=True)], (-1, recipe.samples))
    return {
        "accuracy": float(right_PS.mean()),
        "greedy": float(np.mean([_right(*pair) for pair in zip(asked, likeliest, strict=True)])),
        "any": float(right_PS.any(1).mean()),
        "length": float(np.mean([answer.tokens for answer in sampled])),
        "ended": float(np.mean([answer.ended for answer in sampled])),
    }


def _right(problem: Problem, answer: Answer) -> bool:
    return answer.ended and problem.is_solved_by(answer.text)


@app.command()
def run(
    kind: KindOfModel,
    tokens: Annotated[
        str, typer.Option(help=f"The tokens that learn, by their entropy in a batch: one of {', '.join(TOKENS)}.")
    ],
    base: Annotated[Path, typer.Option(help="Folder of the trained model, of the same kind and seed.")],
    out: Annotated[Path, typer.Option(help="Folder of this run.")],
    seed: Annotated[int, typer.Option(help="Seed of the problems and of the sampled answers.", **SEED)] = 0,
    rounds: Annotated[int | None, of_recipe("Number of rounds.", **COUNT)] = None,
    learning_rate: Annotated[float | None, of_recipe("Learning rate.", **RATE)] = None,
    miniature: Annotated[
        bool, typer.Option("--miniature", help="Take two small rounds, which show that everything works.")
    ] = False,
    minutes: Minutes = None,
    results: Annotated[
        Path, typer.Option(help="Folder for the JSON file of the result; that of a miniature goes to miniature/ in it.")
    ] = Path("results"),
) -> None:
    """Start or resume the rounds of reinforcement learning from a trained model, and write rl-KIND-TOKENS.json.

    A round samples answers to new problems and takes a few steps on them, with TRL's GRPOTrainer. Every tenth round
    tests the model on held-out problems and saves a checkpoint. The run can stop at any time: the next call resumes it
    from the last checkpoint. It needs `pip install '.\\[rl]'`.

    Example, to repeat until it exits with 0:

    python -m experiments.rl run --kind log_linear --tokens top20 --base runs/rl/log_linear
    --out runs/rl/log_linear-top20 --minutes 9
    """
    from experiments.grpo import reinforce  # so that `show` and the figures need no TRL

    recipe = reinforcement(kind, tokens, str(base), miniature=miniature)
    steps = require_trained(base, base_recipe(kind, miniature=miniature).name, seed)
    recipe = recipe.override(seed=seed, start_steps=steps, rounds=rounds, learning_rate=learning_rate)
    for folder in (results, results / "miniature"):
        require_folder(folder, "--results")
    file = result_file(results / "miniature" if miniature else results, f"rl-{kind}-{tokens}", seed)
    settings = {"examples": recipe.held_out}
    require_replaceable(file, recipe, settings)
    trained = reinforce(recipe, out, lambda model: measure(model, recipe), minutes=minutes)
    if trained.interrupted:
        done = f"stopped at round {trained.step // recipe.updates} of {recipe.rounds}"
        raise Interrupted(f"{done}, checkpoint saved in {out}; continue with the same command", trained.signal)
    metrics = read_metrics(out)
    result = {
        "seed": seed,
        "parameters": read_run(base)["parameters"],
        "command": command(),
        "versions": {**versions(), "trl": version("trl")},
        "recipe": recipe.to_dict(),
        "training": training_course(metrics, recipe),
        "evaluation": {**settings, "curve": tests(metrics, recipe)},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_object(file, result)
    print(f"result: {file}")


def require_trained(base: Path, name: str, seed: int) -> int:
    """Return the steps of the trained model in a folder.

    Raises ValueError for a model of another recipe or seed, or an unfinished one. The message names the difference.
    """
    if not base.is_dir():
        raise ValueError(f"there is no trained model {base}: run `python -m experiments.rl pretrain` first")
    recipe = run_recipe(base, "--base")
    if (recipe.name, recipe.seed) != (name, seed):
        raise ValueError(f"--base {base} holds {recipe.name} of seed {recipe.seed}, expected {name} of seed {seed}")
    done = step_of(resolve(base))
    if done < recipe.steps:
        raise ValueError(
            f"--base {base} is trained for {done} of {recipe.steps} steps: run `pretrain` to its end first"
        )
    return recipe.steps


def training_course(metrics: list[dict[str, Any]], recipe: Reinforcement) -> dict[str, Any]:
    """Return the minutes of the steps and, for each round, the means of every metric over its steps."""
    steps = [record for record in metrics if record["split"] == "train"]
    parts = [steps[start : start + recipe.updates] for start in range(0, len(steps), recipe.updates)]
    names = [name for name in steps[0] if name not in ("step", "split", "seconds")]
    curve = [
        {
            "round": part[-1]["step"] // recipe.updates,
            **{name: float(np.mean([record[name] for record in part if name in record])) for name in names},
        }
        for part in parts
    ]
    return {"rounds": recipe.rounds, "minutes": steps[-1]["seconds"] / 60, "curve": curve}


def tests(metrics: list[dict[str, Any]], recipe: Reinforcement) -> list[dict[str, Any]]:
    """Return the scores of every test, with the number of rounds before the test."""
    scores = [{"round": record["step"] // recipe.updates, **record} for record in metrics]
    return [
        {name: value for name, value in record.items() if name not in ("step", "split")}
        for record in scores
        if record["split"] == "held_out"
    ]


def read_runs(results: Path) -> dict[tuple[str, str], list[Result]]:
    """Return the results of each kind and choice of tokens, by seed, from rl-KIND-TOKENS[-seedSEED].json.

    Raises ValueError, which names the files, if seeds differ in more than the seed.
    """
    names = {f"{kind}-{tokens}": (kind, tokens) for kind in KINDS for tokens in TOKENS}
    return {names[name]: runs for name, runs in read_seeds(results, "rl", names).items()}


@app.command()
def show(
    results: Annotated[Path, typer.Option(help="Folder of the JSON files of `run`.")] = Path("results"),
) -> None:
    """Print the scores on held-out problems before and after the rounds: the mean over seeds and their deviation.

    Example:

    python -m experiments.rl show
    """
    runs = require_some(read_runs(results), results, "rl")
    print_table("Held-out problems: percent solved, and tokens of an answer", *scores(runs))


SHOWN = (("sampled", "accuracy", 100), ("likeliest", "greedy", 100), ("length", "length", 1))


def scores(runs: Mapping[tuple[str, str], Sequence[Result]]) -> tuple[list[str], list[list[str]]]:
    """Return the columns and the rows of the table of `show`, for results by kind and choice of tokens."""
    columns = ["kind", "tokens", "seeds", *(f"{name}, {when}" for name, *_ in SHOWN for when in ("before", "after"))]
    rows = []
    for (kind, tokens), seeds in runs.items():
        cells = [
            mean_and_deviation([one["evaluation"]["curve"][place][field] for one in seeds], factor, 1)
            for _, field, factor in SHOWN
            for place in (0, -1)
        ]
        rows.append([kind.replace("_", "-"), NAMES[tokens], seeds_of(seeds), *cells])
    return columns, rows


def seeds_of(runs: Sequence[Result]) -> str:
    """Return the seeds of the results, for a table or a title."""
    return ", ".join(f"{run['seed']}" for run in runs)


if __name__ == "__main__":
    execute(app, "python -m experiments.rl")

"""The commands and their options. The module of each command's name does its work."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from loglinear import __version__

app = typer.Typer(
    name="loglinear",
    help="Train, evaluate and run models with log-linear attention, whose memory grows with log T.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
eval_app = typer.Typer(help="Measure the quality of models.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure speed and memory.", no_args_is_help=True)
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


LARGEST = 2**31 - 1  # of a count: positions of tokens are int32
LARGEST_SEED = 2**32 - 1  # the limit of numpy's generator
PROTOCOL = "the protocol's"
SOURCES = (
    "a file, a folder, a quoted glob, 'stdlib', 'datasets:NAME[:CONFIG]' or 'needle:COUNT:LENGTH[:SOURCE]'; repeatable."
)
MORE_DATA = "Further values of --data, such as the files of a glob that the shell expanded."
Model = Annotated[Path, typer.Option(help="Folder of a checkpoint or of a training run.")]
MoreData = Annotated[list[str] | None, typer.Argument(help=MORE_DATA, show_default=False)]


def _option(default: str, text: str, *names: str, **limits: Any) -> Any:
    """Return an option whose value is None where it is absent, and whose help shows `default`."""
    return typer.Option(*names, help=text, show_default=default, **limits)


_of_recipe = partial(_option, "the recipe's")


def _all_data(data: list[str] | None, more: list[str] | None) -> tuple[str, ...] | None:
    """Return every source, so that `--data a b c` equals `--data a --data b --data c`."""
    if more and not data:
        raise ValueError(f"unexpected argument {more[0]!r}: data is named with --data")
    return (*data, *(more or ())) if data else None


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, metrics.jsonl and run.json.")],
    recipe: Annotated[str | None, typer.Option(help="Name of a recipe, as `loglinear info` lists them.")] = None,
    data: Annotated[list[str] | None, _of_recipe(f"Training text: {SOURCES}")] = None,
    more_data: MoreData = None,
    tokenizer: Annotated[str | None, _of_recipe("'bytes' or the folder of a Hugging Face tokenizer.")] = None,
    variant: Annotated[str | None, _of_recipe("Base model, as `loglinear info` lists them.")] = None,
    num_levels: Annotated[int | None, _of_recipe("Number of levels; 1 makes the linear model.")] = None,
    steps: Annotated[int | None, _of_recipe("Optimiser steps.")] = None,
    seq_len: Annotated[int | None, _of_recipe("Length of the longest sequence, in tokens.")] = None,
    batch_tokens: Annotated[int | None, _of_recipe("Tokens per optimiser step.")] = None,
    micro_batch_tokens: Annotated[int | None, _of_recipe("Tokens per forward pass.")] = None,
    lr: Annotated[float | None, _of_recipe("Peak learning rate.")] = None,
    seed: Annotated[int | None, _of_recipe("Seed of the weights and of the data's order.")] = None,
    eval_every: Annotated[int | None, _of_recipe("Steps between validations.")] = None,
    save_every: Annotated[int | None, _of_recipe("Steps between checkpoints.")] = None,
    compile: Annotated[
        bool | None, _of_recipe("Compile the blocks, on one GPU as CUDA graphs.", "--compile/--no-compile")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out exactly.")] = False,
    minutes: Annotated[
        float | None, typer.Option(help="Save a checkpoint and stop with exit code 130 after about this many minutes.")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard logs.")] = False,
) -> None:
    """Train a model on text.

    The recipe sets every value; an option replaces one of them. Ctrl-C saves a checkpoint and stops.

    Examples:

    `loglinear train --recipe demo --data ~/books --out runs/books`

    `loglinear train --recipe demo --data chapters/*.txt notes.jsonl.zst --out runs/mixed`

    `loglinear train --recipe demo --data 'src/**/*.py' --num-levels 1 --steps 100 --out runs/linear`

    `loglinear train --recipe demo --data needle:10000:2048:stdlib --out runs/needle`

    `loglinear train --recipe small --compile --data ~/books --out runs/small`

    `loglinear train --recipe paper_mamba2 --tokenizer ./tokenizer --data datasets:NAME --out runs/paper`

    `loglinear train --resume --out runs/books --minutes 30`
    """
    from loglinear.cli.train import run

    run(
        out,
        recipe,
        resume=resume,
        minutes=minutes,
        tensorboard=tensorboard,
        data=_all_data(data, more_data),
        tokenizer=tokenizer,
        variant=variant,
        num_levels=num_levels,
        steps=steps,
        seq_len=seq_len,
        batch_tokens=batch_tokens,
        micro_batch_tokens=micro_batch_tokens,
        learning_rate=lr,
        seed=seed,
        eval_every=eval_every,
        save_every=save_every,
        compile=compile,
    )


@app.command()
def tune(
    heads: Annotated[int, typer.Option(help="Number of value heads.")] = 48,
    groups: Annotated[int, typer.Option(help="Number of query/key groups.")] = 1,
    key_dim: Annotated[int, typer.Option(help="Width of a query or key.")] = 128,
    value_dim: Annotated[int, typer.Option(help="Width of a value.")] = 64,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    length: Annotated[
        list[int] | None, _option("16384", "Sequence length, one per range that you use; repeatable.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Number of sequences.")] = 1,
    out: Annotated[Path | None, _option("the table in your cache folder", "Table of plans to extend.")] = None,
) -> None:
    """Measure the GPU kernels for one shape and keep the fastest plan.

    Later runs on this machine use the plan for the same shape.

    Example:

    `loglinear tune --heads 24 --key-dim 128 --value-dim 64 --length 4096 --length 32768`
    """
    from loglinear.cli.tune import run

    run(heads, groups, key_dim, value_dim, dtype, length or [16384], batch, out)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, _option("standard input", "Text to continue.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=LARGEST, help="Most tokens to write.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=100.0, help="Sampling temperature; 0 takes the likeliest token.")
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option(min=0, max=LARGEST, help="Sample from the k likeliest tokens; 0 means all.")
    ] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this total probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a text, token by token.

    The text goes to standard output, the speed to standard error.

    Examples:

    `loglinear generate --model runs/demo/log_linear --prompt "def main("`

    `head -c 2000 README.md | loglinear generate --model runs/demo/log_linear --temperature 0`
    """
    from loglinear.cli.generate import run

    run(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 means all of them.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    max_tokens: Annotated[int, typer.Option(min=1, max=LARGEST, help="Most tokens of an answer.")] = 4096,
    max_prompt: Annotated[int, typer.Option(min=1, max=LARGEST, help="Most tokens of a prompt.")] = 65_536,
    timeout: Annotated[float, typer.Option(help="Seconds of work after which an answer ends.")] = 120.0,
) -> None:
    """Serve a checkpoint over HTTP with OpenAI's API.

    The routes are /v1/completions, /v1/chat/completions, /v1/models and /health. The model's name is the value of
    --model. Without a chat template a chat is its messages, joined by newlines. The server answers one request at a
    time, and refuses one that it cannot honour in full with status 400 and one line.

    Example:

    `loglinear serve --model runs/demo/log_linear --port 8000`
    """
    from loglinear.cli.serve import run

    run(model, host, port, max_tokens=max_tokens, max_prompt=max_prompt, timeout=timeout)


@eval_app.command()
def perplexity(
    model: Model,
    data: Annotated[list[str], typer.Option(help=f"Text to score: {SOURCES}")],
    out: Annotated[Path, typer.Option(help="Folder for perplexity.json and per_position.png.")],
    more_data: MoreData = None,
    length: Annotated[int, typer.Option(min=2, max=LARGEST, help="Length of a window, in tokens.")] = 4096,
    max_tokens: Annotated[int, typer.Option(min=2, max=LARGEST, help="Number of tokens to read, about.")] = 1_000_000,
) -> None:
    """Measure bits per byte, perplexity and the loss at each position.

    Example:

    `loglinear eval perplexity --model runs/demo/log_linear --data ~/books --out runs/demo/books`
    """
    from loglinear.cli.perplexity import run

    run(model, _all_data(data, more_data) or (), out, length=length, max_tokens=max_tokens)


@eval_app.command()
def needle(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for needle.json and needle.png.")],
    length: Annotated[
        list[int] | None,
        _option("1024, 2048, 4096", "Length of an example, in tokens; repeatable.", min=1, max=LARGEST),
    ] = None,
    task: Annotated[
        list[str] | None,
        _option("all of them", "single_1, single_2, multikey_1, multivalue or multiquery; repeatable."),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, max=LARGEST, help="Examples of each task and length.")] = 200,
    data: Annotated[list[str] | None, _option("noise", f"Text of the haystacks: {SOURCES}")] = None,
    more_data: MoreData = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the examples.")] = 0,
) -> None:
    """Measure retrieval with five of RULER's needle-in-a-haystack tasks.

    The haystack of single_1 is always a repeated line of noise. The other tasks use the text of --data, and noise
    without it, except for single_2, which needs text. Accuracy is the share of values whose every token is the
    likeliest one.

    Example:

    `loglinear eval needle --model runs/needle --length 4096 --length 16384 --data ~/books --out runs/needle/eval`
    """
    from loglinear.cli.needle import run

    run(model, _all_data(data, more_data) or (), out, length or [1024, 2048, 4096], task, examples, seed)


@eval_app.command()
def mqar(
    out: Annotated[Path, typer.Option(help="Folder for the results of cells, their checkpoints and mqar.json.")],
    model: Annotated[list[str] | None, _option("five models", "Model to train; repeatable.")] = None,
    dim: Annotated[list[int] | None, _option("16, 32, 64", "Hidden size of the models; repeatable.")] = None,
    lr: Annotated[list[float] | None, _option(PROTOCOL, "Learning rate; repeatable.")] = None,
    seed: Annotated[list[int] | None, _option(PROTOCOL, "Seed of the weights and of the batches; repeatable.")] = None,
    processes: Annotated[
        int | None, _option("one per CPU core", "Number of cells at a time.", min=1, max=LARGEST)
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Save and stop after this many minutes; the same command continues.")
    ] = None,
    task: Annotated[str | None, _option("standard", "'standard', or 'jittered' with longer examples.")] = None,
    examples: Annotated[int | None, _option("20480", "Training examples of each number of pairs.", min=1)] = None,
    epochs: Annotated[int | None, _option("32", "Most passes over the examples.", min=1)] = None,
    pairs: Annotated[list[int] | None, _option("the task's", "Key-value pairs; repeatable.", min=1)] = None,
    length: Annotated[int | None, _option("the task's", "Most tokens of an example.", min=4)] = None,
    protocol: Annotated[
        str | None, _option("loglinear", "How to train: 'loglinear' or, as the task's authors do, 'zoology'.")
    ] = None,
) -> None:
    """Train and score small models on multi-query associative recall.

    A cell is one model, hidden size, learning rate and seed. The whole table tries every learning rate with one
    seed, then trains the best with every seed. Cells in --out are not trained again. A cell takes up to 12,800 steps
    and wants a GPU: a CPU core needs 1 to 9 seconds a step.

    The five models are mamba2, log_linear_mamba2, gated_delta_net, log_linear_gated_delta_net and attention. The
    log-linear names also take the suffixes _bounded and _unit (forms of lambda), _capped (fewer levels) and _blocks
    (one lambda for 64 tokens). The linear names mamba2 and gated_delta_net take _equal_bytes (a decode state of at
    least the log-linear model's bytes) and _states2, 4, 8 or 16 (a state so many times as large), and the prefix
    routed_ (weights that depend on what the buckets hold).

    The standard task has 4 to 64 pairs in 256 tokens; any query sees them all in one bucket. In the jittered task,
    6 to 192 pairs in up to 1,024 tokens, sequences start anywhere in the tree, so the pairs lie in several buckets.

    The last example takes seconds on a CPU; it shows that everything works, and is too short to learn.

    Examples:

    `loglinear eval mqar --out runs/mqar --minutes 9`

    `loglinear eval mqar --task jittered --protocol zoology --model mamba2_equal_bytes --out runs/jittered`

    `loglinear eval mqar --model log_linear_mamba2 --dim 16 --lr 1e-2 --seed 0 --out runs/mqar`

    `loglinear eval mqar --model attention --dim 32 --lr 1e-2 --seed 0 --length 32 --pairs 2 --examples 4000 --epochs 2
    --out runs/miniature`
    """
    from loglinear.cli.mqar import run

    run(
        out,
        models=model,
        dims=dim,
        learning_rates=lr,
        seeds=seed,
        processes=processes,
        minutes=minutes,
        preset=task or "standard",
        task=dict(examples=examples, epochs=epochs, pairs=pairs, length=length, protocol=protocol),
    )


@bench_app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def ops(context: typer.Context) -> None:
    """Time the operators and their peers, in a clone of the repository.

    Options go to benchmarks/ops.py: --lengths N (repeatable), --rounds N, --threads N, --out FILE and others, which
    `python -m benchmarks.ops --help` lists.

    Examples:

    `loglinear bench ops`

    `loglinear bench ops --lengths 4096 --rounds 3 --out ops.json`
    """
    from loglinear.cli.bench import run

    run("ops", context.args)


@app.command()
def info(
    recipe: Annotated[str | None, typer.Option(help="Describe the model of this recipe.")] = None,
    model: Annotated[Path | None, typer.Option(help="Describe the model of this checkpoint.")] = None,
) -> None:
    """Show versions, implementations, variants and recipes, or describe one model.

    The description has the parameters, the share of lambda, and the memory of one sequence by its length. The first
    column is the state with the model's own levels, the second the state with all levels of the sequence, the third
    the key/value cache of a Transformer.

    Examples:

    `loglinear info`

    `loglinear info --recipe paper_mamba2`

    `loglinear info --model runs/demo/log_linear`
    """
    from loglinear.cli.info import run

    run(recipe, model)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, metrics, figures and results.")] = Path(
        "runs/demo"
    ),
    variant: Annotated[str | None, _option("mamba2", "Base model.")] = None,
    steps: Annotated[int | None, _option("240", "Optimiser steps of each model.")] = None,
    seed: Annotated[int | None, _option("0", "Seed of the weights and of the data's order.")] = None,
) -> None:
    """Train a log-linear model and the linear model on a CPU and compare them.

    The data is the text of Python's standard library, so nothing is downloaded.

    Example:

    `loglinear demo --out runs/demo`
    """
    from loglinear.cli.demo import run
    from loglinear.recipes import get_recipe

    run(get_recipe("demo").override(variant=variant, steps=steps, seed=seed), out)

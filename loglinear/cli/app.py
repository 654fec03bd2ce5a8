"""The commands and their options. What they do is in the module of each command's name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loglinear import __version__

app = typer.Typer(
    name="loglinear",
    help="Log-linear attention: train, evaluate and run models whose memory grows with the logarithm of the text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
eval_app = typer.Typer(help="Measure what models learn.", no_args_is_help=True)
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
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


LARGEST = 2**31 - 1  # of a count: places of tokens in a row are int32
LARGEST_SEED = 2**32 - 1  # that numpy's generator takes
DATA_HELP = (
    "File, folder, glob, 'stdlib', 'datasets:NAME[:CONFIG]' or 'needle:COUNT:LENGTH[:SOURCE]'; "
    "may be given several times."
)
Model = Annotated[Path, typer.Option("--model", help="Checkpoint folder, or a training run's folder.")]


def _all_data(data: list[str] | None, more: list[str] | None) -> tuple[str, ...] | None:
    """`--data a b c` means what `--data a --data b --data c` does."""
    if more and not data:
        raise ValueError(f"unexpected argument {more[0]!r}: data is named with --data")
    return (*data, *(more or ())) if data else None


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, metrics.jsonl and run.json.")],
    recipe: Annotated[str | None, typer.Option(help="Named run, see `loglinear info`.")] = None,
    data: Annotated[list[str] | None, typer.Option(help=DATA_HELP)] = None,
    more_data: Annotated[list[str] | None, typer.Argument(help="More of --data: what a shell makes of a glob.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="'bytes' or the folder of a Hugging Face tokenizer.")] = None,
    variant: Annotated[str | None, typer.Option(help="Base model: mamba2, gated_delta_net, ...")] = None,
    num_levels: Annotated[int | None, typer.Option(help="Levels of the Fenwick tree; 1 is the linear model.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Longest stretch of a document read at once, in tokens.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of one optimiser step.")] = None,
    micro_batch_tokens: Annotated[int | None, typer.Option(help="Tokens of one forward pass.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and of the data's order.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between validations.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile: fewer, larger kernels on a GPU.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, exactly.")] = False,
    minutes: Annotated[
        float | None, typer.Option(help="Save and stop (exit code 130) after about so long; --resume goes on.")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log for TensorBoard.")] = False,
) -> None:
    """Train a model.

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
    heads: Annotated[int, typer.Option(help="Value heads.")] = 48,
    groups: Annotated[int, typer.Option(help="Query/key groups.")] = 1,
    key_dim: Annotated[int, typer.Option()] = 128,
    value_dim: Annotated[int, typer.Option()] = 64,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    length: Annotated[list[int] | None, typer.Option(help="Tokens; give one for each range that you use.")] = None,
    batch: Annotated[int, typer.Option()] = 1,
    out: Annotated[Path | None, typer.Option(help="Table to extend (default: the user's own).")] = None,
) -> None:
    """Measure the GPU kernels for a shape, and use the fastest from then on.

    Examples:

    `loglinear tune --heads 24 --key-dim 128 --value-dim 64 --length 4096 --length 32768`
    """
    from loglinear.cli.tune import run

    run(heads, groups, key_dim, value_dim, dtype, length or [16384], batch, out)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; read from standard input if absent.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=LARGEST)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=100.0, help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[
        int, typer.Option(min=0, max=LARGEST, help="Sample among the k likeliest tokens; 0 means all.")
    ] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample within this probability mass.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED)] = 0,
) -> None:
    """Continue a text, token by token.

    Examples:

    `loglinear generate --model runs/demo/log_linear --prompt "def main("`

    `head -c 2000 README.md | loglinear generate --model runs/demo/log_linear --temperature 0`
    """
    from loglinear.cli.generate import run

    run(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    max_tokens: Annotated[int, typer.Option(min=1, max=LARGEST, help="Tokens of the longest answer.")] = 4096,
    max_prompt: Annotated[int, typer.Option(min=1, max=LARGEST, help="Tokens of the longest prompt.")] = 65_536,
    timeout: Annotated[float, typer.Option(help="Seconds of work for one answer, which ends there.")] = 120.0,
) -> None:
    """Serve a checkpoint over HTTP as OpenAI's API: /v1/completions and /v1/chat/completions.

    The model's name is what --model was given. Without a chat template a chat is its messages joined by newlines. One
    request is answered at a time. A request that cannot be honoured in full is refused with status 400 and one line.

    Example:

    `loglinear serve --model runs/demo/log_linear --port 8000`
    """
    from loglinear.cli.serve import run

    run(model, host, port, max_tokens=max_tokens, max_prompt=max_prompt, timeout=timeout)


@eval_app.command()
def perplexity(
    model: Model,
    data: Annotated[list[str], typer.Option(help=DATA_HELP)],
    out: Annotated[Path, typer.Option(help="Folder for perplexity.json and per_position.png.")],
    more_data: Annotated[list[str] | None, typer.Argument(help="More of --data: what a shell makes of a glob.")] = None,
    length: Annotated[int, typer.Option(min=2, max=LARGEST, help="Longest stretch read at once, in tokens.")] = 4096,
    max_tokens: Annotated[int, typer.Option(min=2, max=LARGEST, help="Stop after about this many tokens.")] = 1_000_000,
) -> None:
    """Bits per byte, perplexity, and the loss at each position.

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
        list[int] | None, typer.Option(min=1, max=LARGEST, help="Tokens of an example; several: repeat.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="RULER's name without niah_; several: repeat.")] = None,
    examples: Annotated[int, typer.Option(min=1, max=LARGEST, help="Of each task and length.")] = 200,
    data: Annotated[list[str] | None, typer.Option(help="Haystack of all tasks but single_1. " + DATA_HELP)] = None,
    more_data: Annotated[list[str] | None, typer.Argument(help="More of --data: what a shell makes of a glob.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of the examples.")] = 0,
) -> None:
    """Find needles in haystacks, as RULER has it: single_1, single_2, multikey_1, multivalue, multiquery.

    The haystack is a repeated line of noise or, with --data, text (single_2 needs text). By default all tasks at 1024,
    2048 and 4096 tokens. Accuracy is the share of values whose every token is the likeliest one.

    Example:

    `loglinear eval needle --model runs/needle --length 4096 --length 16384 --data ~/books --out runs/needle/eval`
    """
    from loglinear.cli.needle import run

    run(model, _all_data(data, more_data) or (), out, length or [1024, 2048, 4096], task, examples, seed)


@eval_app.command()
def mqar(
    out: Annotated[Path, typer.Option(help="Folder for a JSON file of each cell, checkpoints and mqar.json.")],
    model: Annotated[list[str] | None, typer.Option(help="Only this model; may be given several times.")] = None,
    dim: Annotated[list[int] | None, typer.Option(help="Only this dimension (default: 16, 32, 64); likewise.")] = None,
    lr: Annotated[list[float] | None, typer.Option(help="Only this rate (default: the protocol's); likewise.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed (default: the protocol's); likewise.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, max=LARGEST, help="Cells at a time (default: one per CPU core).")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop after this time; call again to continue.")] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="For training, of each number of pairs (default: 20480).")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="At most so many (default: 32).")] = None,
    pairs: Annotated[
        list[int] | None, typer.Option(min=1, help="Numbers of pairs (default: 4, 8, 16, 32, 64); likewise.")
    ] = None,
    length: Annotated[int | None, typer.Option(min=4, help="Tokens of an example (default: 256).")] = None,
    protocol: Annotated[
        str | None, typer.Option(help="'loglinear' (default), or 'zoology': as the task's authors train.")
    ] = None,
) -> None:
    """Multi-query associative recall: train small models to look up what they have read, and print the table.

    Besides the five models of the table there are other choices for the log-linear ones, which run when they are named:
    log_linear_mamba2_bounded, _unit (lambda's form), _capped (fewer levels), _blocks (one lambda for blocks of 64
    tokens), and the same of log_linear_gated_delta_net.

    Without options: five models, three dimensions, three learning rates with the smallest seed, and the best of them
    with all seeds, as in the recipe `loglinear/recipes/mqar.py`. What --out holds already is not run again. A cell has
    up to 12,800 steps, which want a GPU: a CPU core takes 1 to 9 seconds for one. The last example takes some seconds
    there; it shows that all works, and has too few steps to learn.

    Examples:

    `loglinear eval mqar --out runs/mqar --minutes 9`

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
        task=dict(examples=examples, epochs=epochs, pairs=pairs, length=length, protocol=protocol),
    )


@bench_app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def ops(context: typer.Context) -> None:
    """Time and memory of the operators beside their peers on this CPU (in a clone of the repository).

    Options go to benchmarks/ops.py: --lengths N (may be repeated), --rounds N, --threads N, --out FILE.

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
    """Versions, implementations, recipes; for one model: parameters, lambda's share, state bytes beside a KV cache.

    A state's size is fixed by the number of levels: the first column keeps the model's own, so that older text shares
    the last level; the second has as many levels as the text needs.

    Examples:

    `loglinear info`

    `loglinear info --recipe paper_mamba2`

    `loglinear info --model runs/demo/log_linear`
    """
    from loglinear.cli.info import run

    run(recipe, model)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo writes.")] = Path("runs/demo"),
    variant: Annotated[str | None, typer.Option(help="Base model instead of mamba2.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of each of the two models.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and of the data's order.")] = None,
) -> None:
    """Train a log-linear model and its linear twin on Python's standard library, on the CPU, and compare them.

    Example:

    `loglinear demo --out runs/demo`
    """
    from loglinear.cli.demo import run
    from loglinear.recipes import get_recipe

    run(get_recipe("demo").override(variant=variant, steps=steps, seed=seed), out)

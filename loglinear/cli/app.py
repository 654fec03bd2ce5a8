"""The commands and their options. The module of each command's name does its work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loglinear import __version__
from loglinear.cli import eval_app
from loglinear.cli.options import (
    COUNT,
    LARGEST,
    RATE,
    SEED,
    SOURCES,
    TEMPERATURE,
    TOKENS,
    Minutes,
    Model,
    MoreTrainingData,
    OneRouting,
    Routing,
    Server,
    above_zero,
    all_data,
    between,
    of_recipe,
    option,
)
from loglinear.cli.serving.service import Service

app = typer.Typer(
    name="loglinear",
    help="Train, evaluate and run models with log-linear attention, whose memory grows with log T.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
bench_app = typer.Typer(help="Measure speed and memory.", no_args_is_help=True)
app.add_typer(eval_app.app, name="eval")
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


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, metrics.jsonl and run.json.")],
    recipe: Annotated[str | None, typer.Option(help="Name of a recipe, as `loglinear info` lists them.")] = None,
    data: Annotated[list[str] | None, of_recipe(f"Training text: {SOURCES}")] = None,
    more_data: MoreTrainingData = None,
    tokenizer: Annotated[str | None, of_recipe("'bytes' or the folder of a Hugging Face tokenizer.")] = None,
    model: Annotated[
        Path | None, option("a new model", "Folder of a model to train: upgraded, converted, or of an earlier run.")
    ] = None,
    variant: Annotated[str | None, of_recipe("Base model, as `loglinear info` lists them.")] = None,
    num_levels: Annotated[int | None, of_recipe("Number of levels; 1 makes the linear model.", **COUNT)] = None,
    steps: Annotated[int | None, of_recipe("Optimiser steps.", **COUNT)] = None,
    seq_len: Annotated[int | None, of_recipe("Length of the longest sequence, in tokens.", **TOKENS)] = None,
    jitter: Annotated[
        int | None,
        of_recipe("Start sequences at random positions of the tree below this one: it trains more levels.", **COUNT),
    ] = None,
    batch_tokens: Annotated[int | None, of_recipe("Tokens per optimiser step.", **TOKENS)] = None,
    micro_batch_tokens: Annotated[int | None, of_recipe("Tokens per forward pass.", **TOKENS)] = None,
    lr: Annotated[float | None, of_recipe("Peak learning rate, more than 0 and at most 1.", **RATE)] = None,
    seed: Annotated[int | None, of_recipe("Seed of the weights and of the data's order.", **SEED)] = None,
    eval_every: Annotated[int | None, of_recipe("Steps between validations.", **COUNT)] = None,
    save_every: Annotated[int | None, of_recipe("Steps between checkpoints.", **COUNT)] = None,
    compile: Annotated[
        bool | None, of_recipe("Compile the blocks, on one GPU as CUDA graphs.", "--compile/--no-compile")
    ] = None,
    checkpointing: Annotated[
        bool | None,
        of_recipe("Compute blocks again in the backward pass: less memory.", "--checkpointing/--no-checkpointing"),
    ] = None,
    dtype: Annotated[
        str | None,
        option("bfloat16 on a GPU that has it, else float32", "Numbers to multiply: bfloat16 or float32."),
    ] = None,
    context_parallel: Annotated[int, typer.Option(help="Processes that share each sequence.", **COUNT)] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out exactly.")] = False,
    minutes: Minutes = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard logs.")] = False,
) -> None:
    """Train a model on text.

    The recipe sets every value; an option replaces one of them. Ctrl-C saves a checkpoint and stops.

    Examples:

    `loglinear train --recipe demo --data ~/books --out runs/books`

    `loglinear train --recipe demo --data chapters/*.txt notes.jsonl.zst --out runs/mixed`

    `loglinear train --recipe demo --data 'src/**/*.py' --num-levels 1 --steps 100 --out runs/linear`

    `loglinear train --recipe demo --data needle:10000:2048:stdlib --out runs/needle`

    `loglinear train --recipe demo --num-levels 15 --jitter 14336 --data ~/books --out runs/starts`

    `loglinear train --recipe small --compile --data ~/books --out runs/small`

    `torchrun --nproc-per-node 2 -m loglinear train --recipe demo --context-parallel 2 --data ~/books --out runs/slices`

    `loglinear train --recipe paper_mamba2 --tokenizer ./tokenizer --data datasets:NAME --out runs/paper`

    `loglinear train --recipe demo --model runs/qwen3-next --data ~/books --out runs/trained`

    `loglinear train --resume --out runs/books --minutes 30`
    """
    from loglinear.cli.train import run

    run(
        out,
        recipe,
        resume=resume,
        minutes=minutes,
        tensorboard=tensorboard,
        context_parallel=context_parallel,
        data=all_data(data, more_data),
        tokenizer=tokenizer,
        start=None if model is None else str(model),
        variant=variant,
        num_levels=num_levels,
        steps=steps,
        seq_len=seq_len,
        jitter=jitter,
        batch_tokens=batch_tokens,
        micro_batch_tokens=micro_batch_tokens,
        learning_rate=lr,
        seed=seed,
        eval_every=eval_every,
        save_every=save_every,
        compile=compile,
        checkpointing=checkpointing,
        dtype=dtype,
    )


@app.command()
def tune(
    heads: Annotated[int, typer.Option(help="Number of value heads.", **COUNT)] = 48,
    groups: Annotated[int, typer.Option(help="Number of query/key groups.", **COUNT)] = 1,
    key_dim: Annotated[int, typer.Option(help="Width of a query or key.", **COUNT)] = 128,
    value_dim: Annotated[int, typer.Option(help="Width of a value.", **COUNT)] = 64,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    length: Annotated[
        list[int] | None, option("16384", "Sequence length, one per range that you use; repeatable.", **COUNT)
    ] = None,
    batch: Annotated[int, typer.Option(help="Number of sequences.", **COUNT)] = 1,
    delta: Annotated[bool, typer.Option("--delta", help="Measure the kernels of the delta rule.")] = False,
    out: Annotated[Path | None, option("the table in your cache folder", "Table of plans to extend.")] = None,
) -> None:
    """Measure the GPU kernels for one shape and keep the fastest plan.

    Later runs on this machine use the plan for the same shape.

    Example:

    `loglinear tune --heads 24 --key-dim 128 --value-dim 64 --length 4096 --length 32768`
    """
    from loglinear.cli.tune import Heads, run

    operator = "delta_rule" if delta else "scalar_gate"
    run(Heads(heads, groups, key_dim, value_dim, dtype, batch, operator), length or [16384], out)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Folder with config.json and the weights.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder of the checkpoint.")],
    format: Annotated[
        str, typer.Option("--from", help="Library that wrote IN: transformers, fla, authors or state-spaces.")
    ],
    num_levels: Annotated[
        int | None, option("15, or those of IN", "Number of levels; 1 makes the linear model.", **COUNT)
    ] = None,
    radix: Annotated[int | None, option("2", "Blocks that join into one.", **between(2, LARGEST))] = None,
    finest_block: Annotated[
        int | None, option("1", "Tokens of the finest block, which share one lambda.", **COUNT)
    ] = None,
    largest_block: Annotated[int | None, option("blocks grow", "Tokens of the largest block.", **COUNT)] = None,
    routing: OneRouting = Routing.none,
) -> None:
    """Convert a checkpoint of another library into one of this library with the same logits.

    A linear model becomes log-linear: every bucket has the weight 1 until training changes it. An option that cannot
    be represented exactly is refused, and so is a tensor that is missing, unexpected or of another shape. No code of
    IN runs. The files of its tokenizer are copied.

    Examples:

    `loglinear convert --from state-spaces mamba2-130m runs/mamba2-130m`

    `loglinear convert --from transformers --num-levels 1 mamba2 runs/linear`

    `loglinear convert --from fla gated_deltanet runs/gated_deltanet`

    `loglinear convert --from authors hattention runs/hattention`
    """
    from loglinear.cli.convert import run

    levels = dict(
        num_levels=num_levels,
        radix=radix,
        finest_block=finest_block,
        largest_block=largest_block,
        routing=routing.score,
    )
    run(source, out, format, {name: value for name, value in levels.items() if value is not None})


@app.command()
def upgrade(
    model: Annotated[Path, typer.Option(help="Folder of a model of transformers.")],
    out: Annotated[Path, typer.Option(help="New folder of the upgraded model.")],
    num_levels: Annotated[
        int, typer.Option(help="Number of levels, at least 2: log2(length) + 1.", **between(2, LARGEST))
    ] = 15,
    radix: Annotated[int, typer.Option(help="Blocks that join into one.", **between(2, LARGEST))] = 2,
    finest_block: Annotated[int, typer.Option(help="Tokens of the finest block, which share one weight.", **COUNT)] = 1,
    largest_block: Annotated[int | None, option("blocks grow", "Tokens of the largest block.", **COUNT)] = None,
    routing: OneRouting = Routing.none,
) -> None:
    """Make the linear layers of a pretrained model of transformers log-linear, with the same logits.

    Every supported linear layer keeps its weights and gets level weights, which are 1 until training changes them. All
    other layers stay as they are. No code of the folder runs. The files of its tokenizer are copied. The commands
    generate, serve, eval and info take the new folder; transformers loads it after `import loglinear`.

    Examples:

    `loglinear upgrade --model qwen3-next --out runs/qwen3-next --num-levels 15`

    `loglinear upgrade --model olmo-hybrid --out runs/olmo-hybrid --routing gram --radix 4 --finest-block 4`
    """
    from loglinear.cli.upgrade import run

    options = dict(num_levels=num_levels, radix=radix, finest_block=finest_block)
    run(model, out, {**options, "largest_block": largest_block, "routing": routing.score})


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, option("standard input", "Text to continue.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to write.", **COUNT)] = 256,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature, 0 to 100; 0 takes the likeliest token.", **TEMPERATURE)
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option(help="Sample from the k likeliest tokens; 0 means all.", **between(0, LARGEST))
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample from the likeliest tokens of this total probability, more than 0 and at most 1.",
            **above_zero(1),
        ),
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", **SEED)] = 0,
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
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 means all of them.")] = Service.host,
    port: Annotated[int, typer.Option(help="Port to listen on.", **between(1, 65535))] = Service.port,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", **COUNT)] = Service.max_tokens,
    max_prompt: Annotated[int, typer.Option(help="Most tokens of a prompt.", **COUNT)] = Service.max_prompt,
    timeout: Annotated[
        float, typer.Option(help="Seconds of work after which an answer ends.", **above_zero(LARGEST))
    ] = Service.timeout,
    slots: Annotated[
        int, typer.Option(help="Requests that are answered at once; 0: one after the other.", **between(0, 1024))
    ] = Service.slots,
    prefix_cache: Annotated[
        int,
        typer.Option(help="MiB of states that repeated beginnings of prompts continue from.", **between(0, LARGEST)),
    ] = Service.prefix_cache,
    engine: Annotated[Server, typer.Option(help="The server: this library's, or vLLM's.")] = Server.loglinear,
) -> None:
    """Serve a checkpoint over HTTP with OpenAI's API.

    The routes are /v1/completions, /v1/chat/completions, /v1/models and /health. The model's name is the value of
    --model. Without a chat template a chat is its messages, joined by newlines. The server answers up to --slots
    requests at once. It refuses one that it cannot honour in full with status 400 and one line. --engine vllm
    runs vLLM's server, which has no --timeout and no size of --prefix-cache.

    Examples:

    `loglinear serve --model runs/demo/log_linear --port 8000`

    `loglinear serve --model runs/demo/log_linear --engine vllm`
    """
    from loglinear.cli import serve, serve_vllm

    run = serve_vllm.run if engine is Server.vllm else serve.run
    run(model, Service(host, port, max_tokens, max_prompt, timeout, slots, prefix_cache))


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
    column is the state with the model's own levels, the second the state with all levels of the sequence. The third is
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
    variant: Annotated[str | None, option("mamba2", "Base model.")] = None,
    steps: Annotated[int | None, option("240", "Optimiser steps of each model.", **COUNT)] = None,
    seed: Annotated[int | None, option("0", "Seed of the weights and of the data's order.", **SEED)] = None,
) -> None:
    """Train a log-linear model and the linear model on a CPU and compare them.

    The data is the text of Python's standard library, so nothing is downloaded.

    Example:

    `loglinear demo --out runs/demo`
    """
    from loglinear.cli.demo import run
    from loglinear.recipes import get_recipe

    run(get_recipe("demo").override(variant=variant, steps=steps, seed=seed), out)

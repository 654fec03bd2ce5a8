"""The commands of `loglinear eval` and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    MoreData,
    above_zero,
    all_data,
    between,
    option,
)

PROTOCOL = "the protocol's"
app = typer.Typer(help="Measure the quality of models.", no_args_is_help=True)


@app.command()
def perplexity(
    model: Model,
    data: Annotated[list[str], typer.Option(help=f"Text to score: {SOURCES}")],
    out: Annotated[Path, typer.Option(help="Folder for perplexity.json and per_position.png.")],
    more_data: MoreData = None,
    length: Annotated[int, typer.Option(help="Length of a window, in tokens.", **TOKENS)] = 4096,
    max_tokens: Annotated[int, typer.Option(help="Number of tokens to read, about.", **TOKENS)] = 1_000_000,
) -> None:
    """Measure bits per byte, perplexity and the loss at each position.

    Example:

    `loglinear eval perplexity --model runs/demo/log_linear --data ~/books --out runs/demo/books`
    """
    from loglinear.cli.perplexity import run

    run(model, all_data(data, more_data) or (), out, length=length, max_tokens=max_tokens)


@app.command()
def needle(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for needle.json and needle.png.")],
    length: Annotated[
        list[int] | None,
        option("1024, 2048, 4096", "Length of an example, in tokens; repeatable.", **COUNT),
    ] = None,
    task: Annotated[
        list[str] | None,
        option("all of them", "single_1, single_2, multikey_1, multivalue or multiquery; repeatable."),
    ] = None,
    examples: Annotated[int, typer.Option(help="Examples of each task and length.", **COUNT)] = 200,
    data: Annotated[list[str] | None, option("noise", f"Text of the haystacks: {SOURCES}")] = None,
    more_data: MoreData = None,
    seed: Annotated[int, typer.Option(help="Seed of the examples.", **SEED)] = 0,
    decode_top_k: Annotated[
        int | None,
        option("all, in one pass", "Decode the answers; a step reads so many buckets of a routed model.", **COUNT),
    ] = None,
) -> None:
    """Measure retrieval with five of RULER's needle-in-a-haystack tasks.

    The haystack of single_1 is always a repeated line of noise. The other tasks use the text of --data, and noise
    without it, except for single_2, which needs text. Accuracy is the share of values whose every token is the
    likeliest one.

    --decode-top-k is for models with a routed read. Every head then reads its own block and the buckets with the
    largest weights. The prompt reads all buckets. With at least the number of buckets nothing is left out.

    Example:

    `loglinear eval needle --model runs/needle --length 4096 --length 16384 --data ~/books --out runs/needle/eval`
    """
    from loglinear.cli.needle import run

    run(
        model,
        all_data(data, more_data) or (),
        out,
        lengths=length or [1024, 2048, 4096],
        tasks=task,
        count=examples,
        seed=seed,
        decode_top_k=decode_top_k,
    )


@app.command()
def entropy(
    model: Model,
    prompt: Annotated[str | None, option("standard input", "Text to continue.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to write.", **COUNT)] = 256,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature, 0 to 100; 0 takes the likeliest token.", **TEMPERATURE)
    ] = 1.0,
    quantile: Annotated[
        float,
        typer.Option(
            help="Share of the tokens that are marked as forking tokens, more than 0 and at most 1.", **above_zero(1)
        ),
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", **SEED)] = 0,
    out: Annotated[
        Path | None, option("the terminal alone", "Folder for entropy.json, entropy.html and entropy.png.")
    ] = None,
) -> None:
    """Show a sampled answer with each token coloured by the entropy of its distribution.

    The entropy is that of the model's distribution at temperature 1, whatever --temperature is. The forking tokens are
    those of the highest entropy: they are underlined and listed. Tokens of equal entropy are marked together.

    Example:

    `loglinear eval entropy --model runs/demo/log_linear --prompt "def main(" --out runs/demo/entropy`
    """
    from loglinear.cli.entropy import run

    run(
        model,
        prompt,
        out,
        quantile=quantile,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )


@app.command()
def membership(
    model: Model,
    members: Annotated[list[str], typer.Option(help=f"Documents that the model was trained on: {SOURCES}")],
    others: Annotated[list[str], typer.Option(help=f"Documents that it was not trained on: {SOURCES}")],
    reference: Annotated[
        Path | None, option("none", "Folder of a second model, with the same tokens, whose loss is subtracted.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Tokens to read of each document, from its beginning.", **TOKENS)
    ] = 2048,
    min_k: Annotated[
        int, typer.Option(help="Share of tokens in the Min-K % score, in percent.", **between(1, 100))
    ] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.", **SEED)] = 0,
    out: Annotated[Path | None, option("the terminal alone", "Folder for membership.json and membership.png.")] = None,
) -> None:
    """Measure how well a model tells documents of its training from others.

    A document is a whole file, or a line of a .jsonl file with a "text". The scores are the loss, its ratio to the
    size under zlib, the loss of the least likely tokens (Min-K %), and with --reference the difference to another
    model's loss. Low scores speak for membership. The table has the area under each ROC curve (AUC) with a bootstrap
    interval, the best F1 with its threshold, and the true positives at 1 % false positives.

    Example:

    `loglinear eval membership --model runs/books --members ~/books --others ~/letters --out runs/books/membership`
    """
    from loglinear.cli.membership import run

    run(
        model,
        tuple(members),
        tuple(others),
        out,
        reference=reference,
        max_tokens=max_tokens,
        min_k=min_k,
        seed=seed,
    )


@app.command()
def mqar(
    out: Annotated[Path, typer.Option(help="Folder for the results of cells, their checkpoints and mqar.json.")],
    model: Annotated[list[str] | None, option("five models", "Model to train; repeatable.")] = None,
    dim: Annotated[list[int] | None, option("16, 32, 64", "Hidden size of the models; repeatable.", **COUNT)] = None,
    lr: Annotated[
        list[float] | None, option(PROTOCOL, "Learning rate, more than 0 and at most 1; repeatable.", **RATE)
    ] = None,
    seed: Annotated[
        list[int] | None, option(PROTOCOL, "Seed of the weights and of the batches; repeatable.", **SEED)
    ] = None,
    processes: Annotated[int | None, option("one per CPU core", "Number of cells at a time.", **COUNT)] = None,
    minutes: Minutes = None,
    task: Annotated[str | None, option("standard", "'standard', or 'jittered' with longer examples.")] = None,
    examples: Annotated[int | None, option("20480", "Training examples of each number of pairs.", **COUNT)] = None,
    epochs: Annotated[int | None, option("32", "Most passes over the examples.", **COUNT)] = None,
    pairs: Annotated[list[int] | None, option("the task's", "Key-value pairs; repeatable.", **COUNT)] = None,
    length: Annotated[int | None, option("the task's", "Most tokens of an example.", **between(4, LARGEST))] = None,
    protocol: Annotated[
        str | None, option("loglinear", "How to train: 'loglinear' or, as the task's authors do, 'zoology'.")
    ] = None,
    compile: Annotated[bool, typer.Option(help="Compile the blocks: faster steps, after about a minute.")] = False,
) -> None:
    """Train and score small models on multi-query associative recall.

    A cell is one model, hidden size, learning rate and seed. The whole table tries every learning rate with one
    seed, then trains the best with every seed. 'zoology' tries every rate with three seeds, and trains the best with
    five others. It drops a rate that is more than 20 points of accuracy behind with the first seed. Cells in --out are
    not trained again. A cell takes up to 12,800 steps and wants a GPU: a CPU core needs 1 to 9 seconds a step.

    The five models are mamba2, log_linear_mamba2, gated_delta_net, log_linear_gated_delta_net and attention. The
    log-linear names also take the suffixes _bounded and _unit (forms of lambda), _capped (fewer levels) and _blocks
    (one lambda for 64 tokens). The linear names mamba2 and gated_delta_net take the suffixes _equal_bytes (a decode
    state of at least the log-linear model's bytes) and _states2, 4, 8 or 16 (a state so many times as large). They also
    take the prefix routed_ (weights that depend on what the buckets hold).

    The standard task has 4 to 64 pairs in 256 tokens; any query sees them all in one bucket. The jittered task has 6 to
    192 pairs in up to 1,024 tokens. Its sequences start anywhere in the tree, so the pairs lie in several buckets.

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
        compile=compile,
        task=dict(examples=examples, epochs=epochs, pairs=pairs, length=length, protocol=protocol),
    )

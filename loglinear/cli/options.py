"""Options that several commands share."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

LARGEST = 2**31 - 1  # of a count: positions of tokens are int32
LARGEST_SEED = 2**32 - 1  # the limit of numpy's generator
SOURCES = (
    "a file, a folder, a quoted glob, 'stdlib', 'datasets:NAME[:CONFIG]' or 'needle:COUNT:LENGTH[:SOURCE]'; repeatable."
)
MORE_DATA = "Further values of --data, such as the files of a glob that the shell expanded."
Model = Annotated[Path, typer.Option(help="Folder of a checkpoint or of a training run.")]
MoreData = Annotated[list[str] | None, typer.Argument(help=MORE_DATA, show_default=False)]


def _refuse_value_of_resume(context: typer.Context, given: list[str] | None) -> list[str] | None:
    """Refuse `--resume DIR`, before typer asks for --out."""
    if given and context.params.get("resume") and not context.params.get("data"):
        recipe = ", without --recipe" * bool(context.params.get("recipe"))
        resume = f"--resume --out {shlex.quote(given[0])}{recipe}"
        raise ValueError(f"--resume takes no value, got {given[0]!r}: continue a run with {resume}")
    return given


MoreTrainingData = Annotated[
    list[str] | None, typer.Argument(help=MORE_DATA, show_default=False, callback=_refuse_value_of_resume)
]


def option(default: str, text: str, *names: str, **limits: Any) -> Any:
    """Return an option whose value is None where it is absent, and whose help shows `default`."""
    return typer.Option(*names, help=text, show_default=default, **limits)


def between(least: float, most: float) -> dict[str, Any]:
    """Return the limits of a numeric option, which include both ends. typer's own errors do not repeat the value."""
    return _limits(lambda value: least <= value <= most, f"lie between {least} and {most}")


def above_zero(most: float = math.inf) -> dict[str, Any]:
    """Return the limits of an option that must be positive and at most `most`."""
    return _limits(
        lambda value: 0 < value <= most, "be positive" + ("" if most == math.inf else f" and at most {most}")
    )


def _limits(allows: Callable[[float], bool], expected: str) -> dict[str, Any]:
    """Return the callback of an option, which may be absent (None) or repeatable. No limits allow nan."""

    def check(given: Any) -> Any:
        for value in given if isinstance(given, (list, tuple)) else [] if given is None else [given]:
            if not allows(value):
                raise typer.BadParameter(f"must {expected}, got {value}")
        return given

    return {"callback": check}


COUNT = between(1, LARGEST)
TOKENS = between(2, LARGEST)  # one token predicts nothing
SEED = between(0, LARGEST_SEED)
RATE = above_zero(1)  # of learning
TEMPERATURE = between(0, 100)  # as `loglinear.evaluation.sampling` takes it
Minutes = Annotated[
    float | None,
    typer.Option(help="Save a checkpoint and stop with exit code 130 after about this many minutes.", **above_zero()),
]
of_recipe = partial(option, "the recipe's")


class Routing(str, Enum):
    """The choices of --routing."""

    none = "none"
    gram = "gram"
    selective_gram = "selective_gram"

    @property
    def score(self) -> str | None:
        """The value of `LogLinearConfig.routing`."""
        return None if self is Routing.none else self.value


class Server(str, Enum):
    """The choices of --engine."""

    loglinear = "loglinear"
    vllm = "vllm"


OneRouting = Annotated[
    Routing,
    option("none", "'gram' or 'selective_gram' for weights that also depend on what the buckets hold, or 'none'."),
]


def all_data(data: list[str] | None, more: list[str] | None) -> tuple[str, ...] | None:
    """Return every source, so that `--data a b c` equals `--data a --data b --data c`."""
    if more and not data:
        raise ValueError(f"unexpected argument {more[0]!r}: data is named with --data")
    return (*data, *(more or ())) if data else None

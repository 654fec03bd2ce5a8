"""Options that several commands share."""

from __future__ import annotations

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


def option(default: str, text: str, *names: str, **limits: Any) -> Any:
    """Return an option whose value is None where it is absent, and whose help shows `default`."""
    return typer.Option(*names, help=text, show_default=default, **limits)


of_recipe = partial(option, "the recipe's")


class Routing(str, Enum):
    """The choices of --routing."""

    none = "none"
    gram = "gram"

    @property
    def score(self) -> str | None:
        """The value of `LogLinearConfig.routing`."""
        return None if self is Routing.none else self.value


OneRouting = Annotated[
    Routing, option("none", "'gram' for weights that also depend on what the buckets hold, or 'none'.")
]


def all_data(data: list[str] | None, more: list[str] | None) -> tuple[str, ...] | None:
    """Return every source, so that `--data a b c` equals `--data a --data b --data c`."""
    if more and not data:
        raise ValueError(f"unexpected argument {more[0]!r}: data is named with --data")
    return (*data, *(more or ())) if data else None

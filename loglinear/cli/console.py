"""Output that several commands and the benchmarks share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loglinear.signals import exit_code

NOTHING = "-"  # a cell without a value
WIDE = 200  # columns of a table that goes to a file or a pipe


class Interrupted(Exception):
    """The end of a run by a signal or its minutes, after it saved a checkpoint. The text says how to continue.

    `code` is the signal's exit code; minutes end like Ctrl-C. No line is printed for an empty text.
    """

    def __init__(self, text: str, signal: int | None = None) -> None:
        super().__init__(text)
        self.code = exit_code() if signal is None else exit_code(signal)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, text: bool = False) -> None:
    """Print a table. The first column names the row; the others are right-aligned numbers, or left-aligned `text`.

    A cell that does not fit into the terminal continues on the next line. Nothing is cut off. A column without a value
    in any row is left out.
    """
    rows, table = list(rows), Table()
    shown = [place for place in range(len(columns)) if not rows or any(row[place] != NOTHING for row in rows)]
    for place in shown:
        table.add_column(columns[place], justify="left" if place == 0 or text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(row[place] for place in shown))
    console = _console()
    console.print(title, style="bold")
    console.print(table)


def print_text(text: Text) -> None:
    """Print coloured text. The terminal wraps its lines; a file or a pipe gets them whole and without colours."""
    _console().print(text, soft_wrap=True)


def _console() -> Console:
    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if narrow else WIDE, markup=False, emoji=False, highlight=False)


def count(number: int, thing: str) -> str:
    """Return a number with its noun: 1 gives '1 step', 2000 gives '2,000 steps'."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def note_all_buckets(evaluation: str, decode_top_k: int | None) -> None:
    """Say on standard error that an evaluation reads all buckets, if decode steps of its model read fewer."""
    if decode_top_k is not None:
        text = f"note: {evaluation} reads all buckets; decode_top_k = {decode_top_k} is for decode steps"
        print(text, file=sys.stderr)


def human_bytes(count: int) -> str:
    """Return a size with its binary unit: 1536 gives '1.5 KiB'."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"

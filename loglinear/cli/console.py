"""What several commands print the same way."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from loglinear.signals import exit_code


class Interrupted(Exception):
    """A run that a signal, or its minutes, stopped after its checkpoint was saved; the text says how to go on.

    Its exit code is the signal's; minutes end like Ctrl-C.
    """

    def __init__(self, text: str, signal: int | None = None) -> None:
        super().__init__(text)
        self.code = exit_code() if signal is None else exit_code(signal)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table: the first column names the row, the others are aligned to the right."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def human_bytes(count: int) -> str:
    """1536 -> '1.5 KiB'."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"

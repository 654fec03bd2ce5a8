"""The command `loglinear`. Heavy imports happen inside the commands, so that --help is instant."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from loglinear.signals import answered, exit_code

if TYPE_CHECKING:
    from typer import Typer

BAD_INPUT = 2
MAY_BE_EMPTY = ("--prompt",)
LONGEST_LINE = 1000  # characters of an error, whatever value it repeats
TRACEBACK = "LOGLINEAR_TRACEBACK"


def main(arguments: list[str] | None = None) -> None:
    """Run the command `loglinear` and exit, as `execute` does."""
    with answered():  # before anything else is imported
        from loglinear.cli.app import app

        execute(app, "loglinear", arguments)


def execute(program: Typer, name: str, arguments: list[str] | None = None) -> None:
    """Run a command line and exit with its code.

    The code is 0, or 2 with one line for bad input, or 128 + the number of a signal with one line.
    LOGLINEAR_TRACEBACK=1 shows the traceback behind a line.
    """
    from loglinear.cli.console import Interrupted

    try:
        _refuse_empty(sys.argv[1:] if arguments is None else arguments)
        with answered():
            code = program(args=arguments, prog_name=name, standalone_mode=False)
    except BrokenPipeError:  # the reader of the output is gone, as in `loglinear generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Interrupted as stopped:
        code = _line(str(stopped), stopped.code)
    except Exception as error:
        code = _explain(error)
    else:
        if code == exit_code():  # typer turns a KeyboardInterrupt into this code
            _line("interrupted", code)
    sys.exit(code or 0)


def _refuse_empty(arguments: list[str]) -> None:
    """Raise ValueError for an option whose value is empty: as a path it would be the current folder."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before in MAY_BE_EMPTY:
            continue
        if argument == "":
            raise ValueError(f"{before if before.startswith('--') else 'an argument'} must not be empty")
        if argument.startswith("--") and argument.endswith("="):
            raise ValueError(f"{argument[:-1]} must not be empty")


def _explain(error: Exception) -> int:
    if type(error).__name__ == "Abort":  # older versions of typer turn a KeyboardInterrupt into it
        return _line("interrupted", exit_code())
    usage = getattr(error, "format_message", None)  # typer's own errors: an unknown option, a missing argument
    known = usage is not None or isinstance(error, (ValueError, OSError)) or _is_about_memory(error)
    if not known or os.environ.get(TRACEBACK):
        raise error
    text = usage() if usage is not None else str(error)
    return _line(f"error: {text}", BAD_INPUT) if text else BAD_INPUT  # a bare `loglinear` has printed its help


def _is_about_memory(error: Exception) -> bool:
    """Return True if the machine has too little memory. torch has no class for an error of the CPU's memory."""
    names = {"MemoryError", "OutOfMemoryError"}
    return bool(names & {kind.__name__ for kind in type(error).__mro__}) or "can't allocate memory" in str(error)


def _line(text: str, code: int) -> int:
    line = " ".join(text.split())
    if line:
        print(line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}...", file=sys.stderr)
    return code

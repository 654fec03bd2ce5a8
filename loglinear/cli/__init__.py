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
LONGEST_LINE = 1000  # characters, whatever value an error repeats
TRACEBACK = "LOGLINEAR_TRACEBACK"


def main(arguments: list[str] | None = None) -> None:
    """The command `loglinear`."""
    with answered():  # before anything else is imported
        from loglinear.cli.app import app

        execute(app, "loglinear", arguments)


def execute(program: Typer, name: str, arguments: list[str] | None = None) -> None:
    """Run a command line and exit: 0, 2 with one line for bad input, 128 + its number with one line after a signal.

    LOGLINEAR_TRACEBACK=1 shows the traceback behind such a line.
    """
    from loglinear.cli.console import Interrupted

    try:
        _refuse_empty(sys.argv[1:] if arguments is None else arguments)
        with answered():
            code = program(args=arguments, prog_name=name, standalone_mode=False)
    except BrokenPipeError:  # the reader of our output left, as in `loglinear generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Interrupted as stopped:
        code = _line(str(stopped), stopped.code)
    except Exception as error:
        code = _explain(error)
    else:
        if code == exit_code():  # what typer makes of a KeyboardInterrupt
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
    if type(error).__name__ == "Abort":  # what older versions of typer make of a KeyboardInterrupt
        return _line("interrupted", exit_code())
    usage = getattr(error, "format_message", None)  # typer's own errors: an unknown option, a missing argument
    known = usage is not None or isinstance(error, (ValueError, OSError)) or _is_about_memory(error)
    if not known or os.environ.get(TRACEBACK):
        raise error
    text = usage() if usage is not None else str(error)
    return _line(f"error: {text}", BAD_INPUT) if text else BAD_INPUT  # a bare `loglinear` has printed its help


def _is_about_memory(error: Exception) -> bool:
    """Whether the machine has too little of it; torch has a class of its own, and none for the CPU's."""
    names = {"MemoryError", "OutOfMemoryError"}
    return bool(names & {kind.__name__ for kind in type(error).__mro__}) or "can't allocate memory" in str(error)


def _line(text: str, code: int) -> int:
    line = " ".join(text.split())
    print(line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}...", file=sys.stderr)
    return code

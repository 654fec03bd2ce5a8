"""The command `loglinear`. Heavy imports happen inside the commands, so that --help is instant."""

import os
import sys

from typer import Typer

from loglinear.cli.app import app
from loglinear.cli.console import Interrupted

BAD_INPUT, INTERRUPTED = 2, 130
TRACEBACK = "LOGLINEAR_TRACEBACK"


def main(arguments: list[str] | None = None) -> None:
    """The command `loglinear`."""
    execute(app, "loglinear", arguments)


def execute(program: Typer, name: str, arguments: list[str] | None = None) -> None:
    """Run a command line and exit: 0, 2 with one line for bad input, 130 with one line after Ctrl-C.

    LOGLINEAR_TRACEBACK=1 shows the traceback behind such a line.
    """
    try:
        code = program(args=arguments, prog_name=name, standalone_mode=False)
    except BrokenPipeError:  # the reader of our output left, as in `loglinear generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Interrupted as stopped:
        code = _line(str(stopped), INTERRUPTED)
    except Exception as error:
        code = _explain(error)
    else:
        if code == INTERRUPTED:  # what typer makes of Ctrl-C
            _line("interrupted", INTERRUPTED)
    sys.exit(code or 0)


def _explain(error: Exception) -> int:
    if type(error).__name__ == "Abort":  # what older versions of typer make of Ctrl-C
        return _line("interrupted", INTERRUPTED)
    usage = getattr(error, "format_message", None)  # typer's own errors: an unknown option, a missing argument
    if (usage is None and not isinstance(error, (ValueError, OSError))) or os.environ.get(TRACEBACK):
        raise error
    text = usage() if usage is not None else str(error)
    return _line(f"error: {text}", BAD_INPUT) if text else BAD_INPUT  # a bare `loglinear` has printed its help


def _line(text: str, code: int) -> int:
    print(" ".join(text.split()), file=sys.stderr)
    return code

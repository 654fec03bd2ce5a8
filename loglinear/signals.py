"""The signals that ask a program to end, and a handler that ends it at once with one line.

This file imports the standard library alone, so that a command can answer before it imports anything else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

ENDING = tuple(
    number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None
)
Handler = Callable[[int, Any], Any] | signal.Handlers


def exit_code(number: int = signal.SIGINT) -> int:
    """Return the code of a process that a signal ended: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
    return 128 + number


def install(handler: Handler) -> dict[int, Any]:
    """Set a handler for the ending signals. Return the previous handlers, for `restore`.

    An ignored signal stays ignored: nohup and the background jobs of a shell rely on it.
    """
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
        return {}
    heard = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def restore(previous: dict[int, Any]) -> None:
    """Restore the handlers that `install` replaced."""
    for number, handler in previous.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: a handler that Python did not set


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """End this process at the first ending signal, with one line and the signal's exit code."""
    previous = install(end)
    try:
        yield
    finally:
        restore(previous)


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Ignore the ending signals in this context. Processes that start in it ignore them for good."""
    previous = install(signal.SIG_IGN)
    try:
        yield
    finally:
        restore(previous)


def end(number: int, frame: object) -> None:
    """Write the name of the signal and exit.

    A handler must not raise: imports and destructors swallow an exception, or turn it into another one.
    """
    with contextlib.suppress(Exception):  # the signal may have interrupted a print
        sys.stdout.flush()
    say("interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}")
    os._exit(exit_code(number))


def say(text: str) -> None:
    """Write a line to standard error from a handler, which may have interrupted print."""
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # a spinner hides it
    new_line = "\n" if os.isatty(2) else ""  # after a progress bar, or the terminal's own ^C
    with contextlib.suppress(OSError):
        os.write(2, f"{show_cursor}{new_line}{text}\n".encode())

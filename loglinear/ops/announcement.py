"""A log line, written once, with the implementation of an operator and the reason why impl="auto" avoids triton."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

logger = logging.getLogger(__name__)
_announced: set[tuple[str, str, str | None]] = set()


def announce(operator: str, impl: str, reason: str | None) -> None:
    """Log the implementation of a call, unless the same line is already logged.

    `reason` says why triton cannot serve a call on a GPU; it is None in every other case.
    """
    if torch.compiler.is_compiling() or (operator, impl, reason) in _announced:
        return
    _announced.add((operator, impl, reason))
    logger.info("%s", _line(operator, impl, reason))


def _line(operator: str, impl: str, reason: str | None) -> str:
    return f"{operator} runs with impl={impl!r}{'' if reason is None else f': {reason}'}"


@contextmanager
def announced() -> Iterator[list[str]]:
    """Collect the lines of the calls in a block, each once, whatever was logged before; the list fills at its end."""
    global _announced
    lines: list[str] = []
    before, _announced = _announced, set()
    try:
        yield lines
    finally:
        lines += sorted(_line(*call) for call in _announced)
        _announced |= before

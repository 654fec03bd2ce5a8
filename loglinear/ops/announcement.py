"""A log line, written once, with the implementation of an operator and the reason why impl="auto" avoids triton."""

import logging

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
    logger.info("%s runs with impl=%r%s", operator, impl, "" if reason is None else f": {reason}")

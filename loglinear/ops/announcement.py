"""The log says once which implementation serves an operator, and why impl="auto" did not take triton on a GPU."""

import logging

import torch

logger = logging.getLogger(__name__)
_announced: set[tuple[str, str, str | None]] = set()


def announce(operator: str, impl: str, reason: str | None) -> None:
    """reason: why triton cannot serve a call on a GPU for which "auto" would have taken it."""
    if torch.compiler.is_compiling() or (operator, impl, reason) in _announced:
        return
    _announced.add((operator, impl, reason))
    logger.info("%s runs with impl=%r%s", operator, impl, "" if reason is None else f": {reason}")

"""The end of one of several processes that train together, which ends the others with one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from loglinear.processes import world_size

GLOO = "/gloo/"  # the backend's errors are plain RuntimeErrors, which name its source file


class LostProcess(ConnectionError):
    """Another process of the training cannot be reached any more."""


def loss_of_process(error: BaseException | None) -> str | None:
    """Return the reason for which processes cannot reach each other, or None for an error of another kind."""
    if error is None:
        return None
    text = str(error)
    if isinstance(error, RuntimeError) and GLOO in text:
        return re.sub(r"^\[[^]]*\] ", "", text).partition(". This is")[0]
    if isinstance(error, getattr(torch.distributed, "DistError", ())):
        return text.partition("\n")[0]
    return loss_of_process(error.__cause__)


@contextmanager
def together(out: Path) -> Iterator[None]:
    """Turn the loss of another process into one line that says how the run in a folder continues.

    The launcher (torchrun, accelerate launch) ends processes that wait for a lost one without noticing it.

    Raises LostProcess.
    """
    try:
        yield
    except Exception as error:
        reason = loss_of_process(error) if world_size() > 1 else None
        if reason is None:
            raise
        raise LostProcess(
            f"process {os.environ.get('RANK')} of {world_size()} has lost another one ({reason}): start all of them "
            f"again with --resume --out {out}, and the run continues from its last whole checkpoint"
        ) from error

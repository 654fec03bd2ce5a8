"""The end of one of several processes that train together, which ends the others with one line."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from loglinear.processes import world_size
from loglinear.signals import exit_code, say

GRACE = 25.0  # seconds; torchrun kills a process 30 seconds after SIGTERM, without a word
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

    NCCL may wait for a lost process without noticing it. The launcher (torchrun, accelerate launch) notices, sends
    SIGTERM to the others, and kills them later. Shortly before that, a process which still waits writes its line.

    Raises LostProcess.
    """
    me = f"process {os.environ.get('RANK')} of {world_size()}"
    advice = f"start all of them again with --resume --out {out}, and the run continues from its last whole checkpoint"
    try:
        with _ending_in_time(f"error: {me} still waits for another one {GRACE:g} seconds after SIGTERM: {advice}"):
            yield
    except Exception as error:
        reason = loss_of_process(error) if world_size() > 1 else None
        if reason is None:
            raise
        raise LostProcess(f"{me} has lost another one ({reason}): {advice}") from error


@contextmanager
def _ending_in_time(text: str) -> Iterator[None]:
    """End this process with a line if it is still in this context GRACE seconds after SIGTERM, and torchrun's.

    A thread does so, because the main thread, which runs the handlers of signals, may wait in a collective.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if world_size() == 1 or not in_main_thread or not torch.distributed.is_torchelastic_launched():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    has_ended = threading.Event()
    threading.Thread(target=_watch, args=(reader, has_ended, text), daemon=True).start()
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        has_ended.set()
        writer.close()


def _watch(reader: socket.socket, has_ended: threading.Event, text: str) -> None:
    """Read the numbers of this process's signals, until the context has ended."""
    with reader:
        while number := reader.recv(1):
            if number[0] == signal.SIGTERM and not has_ended.wait(GRACE):
                say(text)
                os._exit(exit_code(signal.SIGTERM))

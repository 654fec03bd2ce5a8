"""This process among others: those that train together, and the workers of one that has started them."""

import multiprocessing
import os
import signal
import threading


def is_main_process() -> bool:
    """Return True for the one process that writes files and speaks. torchrun and accelerate launch name it."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def follow_parent() -> None:
    """Let this worker process leave the signals of a terminal to its parent, and end with it.

    A terminal signals all processes of a program. A worker of a killed parent would go on with its work, and then wait
    for more. SIGTERM still ends the worker: a pool that has broken uses it.
    """
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

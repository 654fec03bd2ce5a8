"""Slabs that run at once, each on a thread of its own.

torch gives the rows of every large operation to all threads and waits for the last one. A call has hundreds of
operations. Next to other processes the last thread often has no processor, and the others spin until it has one. So
slabs run at once where they fit. Their threads meet once a call, and sleep while they wait.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from loglinear.kernels.torch.workspace import recycled

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Own(threading.local):
    """The team of one thread. It lives as long as its thread, as a team of OpenMP does."""

    team: ThreadPoolExecutor | None = None
    shape = (0, 0)


_own = _Own()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=lambda: _own.__dict__.clear())  # a forked process has none of these threads


def _use(threads: int) -> None:
    torch.get_num_threads()  # a thread's first query sets its number to the default, so it must come first
    torch.set_num_threads(threads)


def _team(size: int, threads: int) -> ThreadPoolExecutor:
    """Return this thread's team of `size` threads, whose operations have `threads` threads each."""
    if _own.team is None or _own.shape != (size, threads):
        with ThreadPoolExecutor(1) as bystander:
            # torch.set_num_threads sets the number of its caller, and of all threads that start later.
            default = bystander.submit(torch.get_num_threads).result()
            _own.team, _own.shape = ThreadPoolExecutor(size, "loglinear", _use, (threads,)), (size, threads)
            list(_own.team.map(lambda _, barrier: barrier.wait(), range(size), [threading.Barrier(size)] * size))
            bystander.submit(torch.set_num_threads, default).result()
    return _own.team


def run(
    compute: Callable[[Item], Result], add: Callable[[Item, Result], None], items: Sequence[Item], at_once: int
) -> None:
    """Call add(item, compute(item)) for all items, `at_once` at a time.

    The results are added in the order of the items, so sums have the same bits each time.
    """
    if at_once == 1:
        for item in items:
            add(item, compute(item))
        return
    added = [threading.Event() for _ in items]

    def work(i: int) -> None:
        try:
            with torch.inference_mode(), recycled():
                result = compute(items[i])
                if i:
                    added[i - 1].wait()
                add(items[i], result)
        finally:
            added[i].set()

    list(_team(at_once, torch.get_num_threads() // at_once).map(work, range(len(items))))

"""Slabs that run at once, each on a thread of its own.

torch gives the rows of every large operation to all threads and waits for the last one. A call has hundreds of
operations. Next to other processes the last thread often has no processor, and the others spin until it has one. So
slabs run at once where they fit. Their threads meet once a call, and sleep while they wait.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from loglinear.kernels.torch.workspace import recycled

Item = TypeVar("Item")
Result = TypeVar("Result")

_teams: dict[tuple[int, int], ThreadPoolExecutor] = {}  # by size, and threads of an operation
_lock = threading.Lock()


def _forget() -> None:
    """Forget all teams: a forked process has none of their threads."""
    global _lock
    _teams.clear()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget)


def _use(threads: int) -> None:
    torch.get_num_threads()  # a thread's first query sets its number to the default, so it must come first
    torch.set_num_threads(threads)


def _team(size: int, threads: int) -> ThreadPoolExecutor:
    """Return the process's team of `size` threads, whose operations have `threads` threads each.

    Raises RuntimeError if no more threads can start: there are too many, or the interpreter is ending.
    """
    with _lock:
        if (size, threads) not in _teams:
            _teams[size, threads] = _new_team(size, threads)
        return _teams[size, threads]


def _new_team(size: int, threads: int) -> ThreadPoolExecutor:
    with ThreadPoolExecutor(1) as bystander:
        # torch.set_num_threads sets the number of its caller, and of all threads that start later.
        default = bystander.submit(torch.get_num_threads).result()
        team, barrier = ThreadPoolExecutor(size, "loglinear", _use, (threads,)), threading.Barrier(size)
        try:
            list(team.map(lambda _: barrier.wait(), range(size)))
        except BaseException:
            barrier.abort()
            team.shutdown(cancel_futures=True)
            raise
        finally:
            bystander.submit(torch.set_num_threads, default).result()
    return team


def run(
    compute: Callable[[Item], Result], add: Callable[[Item, Result], None], items: Sequence[Item], at_once: int
) -> None:
    """Call add(item, compute(item)) for all items, `at_once` at a time.

    Results are added in the order of the items, so that sums have the same bits each time. The calling thread works on
    items that no other thread accepts.
    """
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

    futures: list[Future[None]] = []
    if at_once > 1:
        try:
            team = _team(at_once, torch.get_num_threads() // at_once)
            for i in range(len(items)):
                futures.append(team.submit(work, i))
        except RuntimeError:  # the main thread has ended, or there are too many threads
            pass
    for future in futures:
        future.result()
    for item in items[len(futures) :]:
        add(item, compute(item))

"""Many cells at once: worker processes on one device, one progress bar, and an end at which nothing is lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from loglinear.evaluation.mqar.folder import Result, read_results, require_same_task
from loglinear.evaluation.mqar.run_cell import run_cell
from loglinear.evaluation.mqar.table import best_learning_rate
from loglinear.recipes.mqar import RecallCell, RecallTable
from loglinear.training.callbacks import StopOnSignal

POLL_SECONDS = 0.5  # how late a signal or the end of the time is noticed


class Progress(NamedTuple):
    """How far a table is."""

    finished: int
    total: int
    interrupted: bool  # by a signal


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_table(
    table: RecallTable, out: Path, *, processes: int, seconds: float | None = None, progress: bool = True
) -> Progress:
    """Run all cells of a table that `out` does not hold yet, `processes` at a time.

    After `seconds`, or on SIGINT or SIGTERM, every running cell saves a checkpoint; the next call with the same table
    and folder continues, and gives the results of one that was never stopped.

    Raises ValueError for a folder with another task, and where a worker died.
    """
    results = read_results(out, table.task)
    for cell in _ready(table, {}):
        require_same_task(out, cell)
    end = float("inf") if seconds is None else time.monotonic() + seconds
    context = _context()
    stop = context.Event()
    threads = max(1, cores() // processes)
    pool = ProcessPoolExecutor(processes, context, _start_worker, (stop, threads))
    with StopOnSignal() as signals, pool, _bar(table, results, progress) as bar:
        running: dict[Future[Result | None], RecallCell] = {}
        try:
            while True:
                new = [] if stop.is_set() else [c for c in _ready(table, results) if c not in running.values()]
                running |= {pool.submit(_work, cell, out): cell for cell in new}
                if not running:
                    break
                if new:
                    bar.set_postfix(running=min(processes, len(running)))
                for future in wait(running, POLL_SECONDS, FIRST_COMPLETED).done:
                    cell, result = running.pop(future), future.result()
                    if result is not None:
                        results[cell.name] = result
                        bar.set_postfix(running=min(processes, len(running)), refresh=False)
                        bar.update()
                if signals.requested or time.monotonic() >= end:
                    stop.set()
        except BrokenProcessPool:
            if not signals.requested:  # one that reached the whole process group ends the workers too
                raise ValueError("a worker process died, for lack of memory perhaps: give fewer --processes") from None
        finally:
            stop.set()
    return Progress(_finished(table, results), len(table), signals.requested)


def _ready(table: RecallTable, results: Mapping[str, Result]) -> Iterator[RecallCell]:
    """Cells without a result whose learning rate is known."""
    for group in table.groups():
        cells = table.sweep(*group)
        swept = [results[cell.name] for cell in cells if cell.name in results]
        if len(swept) == len(cells):
            cells = table.repeats(*group, best_learning_rate(swept))
        yield from (cell for cell in cells if cell.name not in results)


def _finished(table: RecallTable, results: Mapping[str, Result]) -> int:
    """Cells of the table that have a result."""
    finished = 0
    for group in table.groups():
        swept = [results[cell.name] for cell in table.sweep(*group) if cell.name in results]
        finished += len(swept)
        if len(swept) == len(table.learning_rates):
            repeats = table.repeats(*group, best_learning_rate(swept))
            finished += sum(cell.name in results for cell in repeats)
    return finished


def _bar(table: RecallTable, results: Mapping[str, Result], progress: bool) -> tqdm:
    return tqdm(
        total=len(table),
        initial=_finished(table, results),
        desc="mqar",
        unit="cell",
        disable=not progress,
        dynamic_ncols=True,
    )


# --- in the workers --------------------------------------------------------------------------------------------------

_stop: Event | threading.Event = threading.Event()  # in a worker: the event that all of them share


def _context() -> BaseContext:
    """Workers start from a server that has imported everything and never used CUDA, whose users cannot be forked."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([run_cell.__module__])
    return context


def _start_worker(stop: Event, threads: int) -> None:
    global _stop
    _stop = stop
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed leaves no workers behind: they would write where its successor does."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(cell: RecallCell, out: Path) -> Result | None:
    return run_cell(cell, out, _stop)

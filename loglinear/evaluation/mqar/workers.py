"""Many cells at once: worker processes on one device, one progress bar, and a stop that loses nothing."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from loglinear.evaluation.mqar.cells import RecallCell, RecallTable
from loglinear.evaluation.mqar.folder import Result, epochs_trained, read_results, require_same_task
from loglinear.evaluation.mqar.table import best_learning_rate, promising_rates
from loglinear.evaluation.mqar.training import run_cell
from loglinear.processes import follow_parent
from loglinear.signals import exit_code, ignored
from loglinear.training.callbacks import StopEarly

POLL_SECONDS = 0.5  # delay until a signal or the end of the minutes is noticed


class Progress(NamedTuple):
    """The state of a table, and the signal that stopped it, if any."""

    finished: int
    total: int
    signal: int | None = None


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_table(
    table: RecallTable,
    out: Path,
    *,
    processes: int,
    minutes: float | None = None,
    progress: bool = True,
    compile: bool = False,
) -> Progress:
    """Run all cells of a table without a result in `out`, `processes` at a time. Return how far the table is.

    With `compile` the training's blocks are compiled, see `run_cell`.

    After `minutes`, or on SIGINT, SIGTERM or SIGHUP, every running cell saves a checkpoint. The next call with the same
    table and folder continues, with the results of an uninterrupted one.

    Raises ValueError for a folder with another task, and if a worker dies.
    """
    results = read_results(out, table.task)
    for cell in _missing(table, results):
        require_same_task(out, cell)
    pool, stop = _workers(processes)
    with StopEarly(minutes) as early, pool, _bar(table, results, progress) as bar:
        running: dict[Future[Result | None], RecallCell] = {}
        try:
            while True:
                new = [] if stop.is_set() else [c for c in _missing(table, results) if c not in running.values()]
                running |= {pool.submit(_work, cell, out, compile): cell for cell in new}
                if not running:
                    break
                bar.set_postfix(running=min(processes, len(running)), epochs=f"{epochs_trained(out, table.task):.1f}")
                for future in wait(running, POLL_SECONDS, FIRST_COMPLETED).done:
                    cell, result = running.pop(future), _result(future)
                    if result is not None:
                        results[cell.name] = result
                        bar.total = _total(table, results)
                        bar.update()
                if early.is_due:
                    stop.set()
        except BrokenProcessPool:
            if early.signal is None:  # a signal to the process group ends the workers too
                raise ValueError("a worker process died, perhaps for lack of memory: give fewer --processes") from None
        finally:
            stop.set()
    return Progress(_finished(table, results), _total(table, results), early.signal)


def _result(future: Future[Result | None]) -> Result | None:
    try:
        return future.result()
    except torch.OutOfMemoryError as error:
        raise ValueError("the device has too little memory for that many cells: give fewer --processes") from error


def _known(table: RecallTable, results: Mapping[str, Result]) -> list[RecallCell]:
    """Return the cells that are known so far.

    The other tuning seeds of a model follow when the first has tried all rates. The reported seeds follow when the
    learning rate is chosen.
    """
    cells = []
    for group in table.groups():
        sweep = table.trial(*group)
        if tried := _results_of(sweep, results):
            sweep = [*dict.fromkeys(sweep + table.sweep(*group, promising_rates(tried)))]
        cells += sweep
        if _results_of(sweep, results) is not None:
            # A folder of earlier versions has hopeless rates with all their tuning seeds, which count as in the table.
            swept = [results[cell.name] for cell in table.sweep(*group) if cell.name in results]
            cells += table.repeats(*group, best_learning_rate(swept) if swept else table.learning_rates[0])
    return cells


def _results_of(cells: list[RecallCell], results: Mapping[str, Result]) -> list[Result] | None:
    """Return the results of cells, or None if one is missing."""
    return [results[cell.name] for cell in cells] if all(cell.name in results for cell in cells) else None


def _missing(table: RecallTable, results: Mapping[str, Result]) -> list[RecallCell]:
    """Return the known cells without a result."""
    return [cell for cell in _known(table, results) if cell.name not in results]


def _finished(table: RecallTable, results: Mapping[str, Result]) -> int:
    return sum(cell.name in results for cell in _known(table, results))


def _total(table: RecallTable, results: Mapping[str, Result]) -> int:
    """Return the number of cells in the whole table without those of hopeless rates that are known so far."""
    tried = (_results_of(table.trial(*group), results) for group in table.groups())
    hopeless = sum(len(found) - len(promising_rates(found)) for found in tried if found)
    return len(table) - hopeless * (len(table.tuning_seeds) - 1)


def _bar(table: RecallTable, results: Mapping[str, Result], progress: bool) -> tqdm:
    return tqdm(
        total=_total(table, results),
        initial=_finished(table, results),
        desc="mqar",
        unit="cell",
        disable=not progress,
        dynamic_ncols=True,
    )


def _workers(processes: int) -> tuple[Executor, Event | threading.Event]:
    """Return the workers and the flag that stops them. A single worker is a thread of this process and starts at once.

    Processes fork from a server that has imported everything but never used CUDA, after which forking is impossible.
    """
    if processes == 1:
        flag = threading.Event()
        return ThreadPoolExecutor(1, initializer=_share, initargs=(flag,)), flag
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        context.set_forkserver_preload([run_cell.__module__])
        with ignored():  # a signal to all processes must leave the workers a server to report to
            resource_tracker.ensure_running()
            forkserver.ensure_running()
    stop = context.Event()
    return ProcessPoolExecutor(processes, context, _start_process, (stop, max(1, cores() // processes))), stop


# --- in the workers --------------------------------------------------------------------------------------------------

_stop: Event | threading.Event = threading.Event()  # the flag that all workers share


def _share(stop: Event | threading.Event) -> None:
    global _stop
    _stop = stop


def _start_process(stop: Event, threads: int) -> None:
    _share(stop)
    torch.set_num_threads(threads)
    follow_parent()  # a worker of a killed parent would write into the next run's files
    signal.signal(signal.SIGTERM, _this.terminate)  # a broken pool also ends its workers with it


class _Worker:
    """This worker, and the flag of its cell: set by the flag that all workers share, or by a SIGTERM to this one."""

    running = False
    signal: int | None = None

    def is_set(self) -> bool:
        return self.signal is not None or _stop.is_set()

    def terminate(self, number: int, frame: object) -> None:
        """End this worker. A running cell saves its checkpoint first."""
        self.signal = number
        if not self.running:
            os._exit(exit_code(number))

    def work(self, cell: RecallCell, out: Path, compile: bool) -> Result | None:
        self.running = True
        try:
            return run_cell(cell, out, self, compile=compile)
        except Exception as error:
            raise sendable(error) from None
        finally:
            self.running = False
            if self.signal is not None:
                os._exit(exit_code(self.signal))


def sendable(error: Exception) -> Exception:
    """Return the error, or one with its traceback as text if it cannot go to another process, as some of a compiler."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


_this = _Worker()


def _work(cell: RecallCell, out: Path, compile: bool) -> Result | None:
    return _this.work(cell, out, compile)

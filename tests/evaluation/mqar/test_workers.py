"""Many cells in parallel processes: the same results as one after the other, also where the time ran out."""

import dataclasses
import pickle
import threading

import torch

from loglinear.evaluation.mqar import Progress, read_results, run_cell, run_table
from loglinear.evaluation.mqar.cells import RecallTable
from loglinear.evaluation.mqar.table import best_learning_rate
from loglinear.evaluation.mqar.workers import _finished, _missing, _total, sendable
from tests.evaluation.mqar.tiny import TASK, AfterSteps, result_of, tiny_cell

SHORT = dataclasses.replace(TASK, examples=256, epochs=2)


def exact(results):
    return {
        name: {key: value for key, value in result.items() if key not in ("seconds", "versions", "command")}
        for name, result in results.items()
    }


OPTIONS = dict(processes=2, progress=False)


def two_cells(task):
    return RecallTable(models=("attention",), dims=(16, 32), learning_rates=(1e-2,), seeds=(0,), task=task)


def test_table_stops_when_its_time_is_over(tmp_path):
    endless = dataclasses.replace(SHORT, epochs=100_000, good_enough=1.0)
    assert run_table(two_cells(endless), tmp_path, minutes=0.0, **OPTIONS) == Progress(0, 2)


def test_table_in_two_processes_gives_what_its_cells_give_alone(tmp_path):
    torch.set_num_threads(1)  # as each of the two has
    table = two_cells(SHORT)
    stopped = tiny_cell(task=SHORT)
    assert run_cell(stopped, tmp_path / "a", AfterSteps(5)) is None
    assert run_table(table, tmp_path / "a", **OPTIONS) == Progress(2, 2)
    found = read_results(tmp_path / "a", SHORT)
    alone = {}
    for dim in (16, 32):
        cell = tiny_cell(dim=dim, task=SHORT)
        alone[cell.name] = run_cell(cell, tmp_path / "b", threading.Event())
    assert exact(found) == exact(alone)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "a" / "cells").iterdir()}
    assert run_table(table, tmp_path / "a", **OPTIONS) == Progress(2, 2)  # nothing is run again
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "a" / "cells").iterdir()}


def test_seeds_are_repeated_only_at_the_best_learning_rate_and_only_when_it_is_known():
    table = RecallTable(models=("attention",), dims=(16,), learning_rates=(1e-3, 1e-2), seeds=(0, 1), task=TASK)
    assert {(cell.learning_rate, cell.seed) for cell in _missing(table, {})} == {(1e-3, 0), (1e-2, 0)}
    results = {(cell := tiny_cell()).name: result_of(cell, 0.5)}
    assert [(cell.learning_rate, cell.seed) for cell in _missing(table, results)] == [(1e-3, 0)]
    results[(cell := tiny_cell(learning_rate=1e-3)).name] = result_of(cell, 0.4)
    assert [(cell.learning_rate, cell.seed) for cell in _missing(table, results)] == [(1e-2, 1)]
    assert _finished(table, results) == 2 and len(table) == 3
    results[(cell := tiny_cell(seed=1)).name] = result_of(cell, 0.4)
    assert _missing(table, results) == [] and _finished(table, results) == 3


def test_further_tuning_seeds_try_no_hopeless_rate():
    task = dataclasses.replace(TASK, protocol="zoology")
    rates, validation = (1e-3, 1e-2, 3e-2), (0.19, 0.4, 0.35)
    table = RecallTable(models=("attention",), dims=(16,), learning_rates=rates, task=task)
    trial = [tiny_cell(learning_rate=rate, seed=0, task=task) for rate in rates]
    assert _missing(table, {}) == trial and _total(table, {}) == len(table) == 14
    results = {c.name: result_of(c, 0.5, validation=value) for c, value in zip(trial, validation, strict=True)}
    others = _missing(table, results)
    assert {(cell.learning_rate, cell.seed) for cell in others} == {(r, s) for r in (1e-2, 3e-2) for s in (1, 2)}
    results |= {c.name: result_of(c, 0.5, validation=0.1 if c.learning_rate == 1e-2 else 0.15) for c in others}
    repeats = _missing(table, results)  # 0.2 and 0.217 on average: the hopeless rate's only seed has no say
    assert {(cell.learning_rate, cell.seed) for cell in repeats} == {(3e-2, seed) for seed in (3, 4, 5, 6, 7)}
    results |= {cell.name: result_of(cell, 0.5) for cell in repeats}
    assert _missing(table, results) == [] and _finished(table, results) == _total(table, results) == 12


def test_a_finished_table_of_earlier_versions_stays_finished():
    """They tried every rate with every tuning seed. The chosen one may be hopeless with the first."""
    task = dataclasses.replace(TASK, protocol="zoology")
    tried = {1e-3: (0.9, 0.5, 0.5), 1e-2: (0.6, 0.95, 0.95)}
    table = RecallTable(models=("attention",), dims=(16,), learning_rates=tuple(tried), task=task)
    cells = {
        tiny_cell(learning_rate=rate, seed=seed, task=task): value
        for rate, values in tried.items()
        for seed, value in enumerate(values)
    } | {tiny_cell(learning_rate=1e-2, seed=seed, task=task): 0.9 for seed in table.seeds}
    results = {cell.name: result_of(cell, 0.5, validation=value) for cell, value in cells.items()}
    assert best_learning_rate(results.values()) == 1e-2
    assert _missing(table, results) == [] and _finished(table, results) == _total(table, results)


def test_an_error_that_cannot_be_pickled_arrives_with_its_traceback():
    error = RuntimeError("no such kernel")
    error.frame = pickle  # a module, as errors of a compiler hold
    received = pickle.loads(pickle.dumps(sendable(error)))
    assert "RuntimeError: no such kernel" in str(received)
    kept = ValueError("a mistake of the user")
    assert sendable(kept) is kept

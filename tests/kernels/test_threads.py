"""Slabs that run at once: the same bits as one after the other, no memory per call, and the caller's settings stay."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from loglinear.kernels.torch import chunks, slab, threads, workspace
from loglinear.kernels.torch.schedule import schedule
from tests.kernels.test_workspace import outcome, same
from tests.ops.operators import OPERATORS

CHUNK, T, HEADS, WIDTH = 32, 150, 4, 64
HEAD_BYTES = (-(-T // CHUNK) + 1) * CHUNK * WIDTH * 4


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(chunks, "SMALLEST_SHARE", 1)
    monkeypatch.setattr(workspace, "SMALLEST", 1)
    monkeypatch.setitem(chunks.SLAB_BYTES, "cpu", HEAD_BYTES)  # slabs of one head
    yield
    torch.set_num_threads(before)


def problem(operator, G):
    torch.manual_seed(1)
    return operator.inputs(B=1, T=T, G=G, H=HEADS, K=32, V=WIDTH, L=6, dtype=torch.float32)


@pytest.fixture
def seen(monkeypatch):
    """The threads that work on slabs, each with the number of threads of its operations."""
    seen, to_chunks = set(), slab.to_chunks

    def spy(*args):
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return to_chunks(*args)

    monkeypatch.setattr(slab, "to_chunks", spy)
    return seen


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
@pytest.mark.parametrize("G", [1, 2, 4])
def test_slabs_at_once_have_the_bits_of_one_after_the_other(operator, G, seen):
    inputs = problem(operator, G)
    outcomes = [outcome(operator, inputs) for _ in range(4)]
    assert threading.get_ident() not in {ident for ident, _ in seen}
    assert {count for _, count in seen} == {1}  # their operations have no other thread to wait for
    torch.set_num_threads(1)
    seen.clear()
    expected = outcome(operator, inputs)
    assert seen == {(threading.get_ident(), 1)}
    assert all(same(result, expected) for result in outcomes)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_inference_mode_is_served(operator):
    inputs = problem(operator, 2)
    expected = operator(inputs, impl="torch", chunk_size=CHUNK).output
    with torch.inference_mode():
        output = operator(inputs, impl="torch", chunk_size=CHUNK).output
        assert output.is_inference() and torch.equal(output, expected)


def test_the_numbers_of_threads_of_everybody_else_stay(monkeypatch):
    monkeypatch.setattr(threads, "_teams", {})
    others = []

    def ask():
        others.append(torch.get_num_threads())

    for _ in range(2):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        outcome(OPERATORS[0], problem(OPERATORS[0], 1))
    assert torch.get_num_threads() == 2
    assert others[0] == others[1]


def test_calls_take_no_more_memory_once_every_thread_has_its_own(monkeypatch):
    made = []

    def count(size):
        made.append(size)
        return bytearray(size)

    monkeypatch.setattr(workspace, "bytearray", count, raising=False)
    inputs = problem(OPERATORS[0], 4)
    monkeypatch.setattr(workspace, "_own", workspace._Blocks())
    monkeypatch.setattr(threads, "_teams", {})
    torch.set_num_threads(1)
    OPERATORS[0](inputs, impl="torch", chunk_size=CHUNK)
    of_one = len(made)
    torch.set_num_threads(2)
    for _ in range(10):
        OPERATORS[0](inputs, impl="torch", chunk_size=CHUNK)
    assert 0 < len(made) <= 3 * of_one  # the caller's blocks, and those of two threads


@pytest.mark.parametrize("heads, size, at_once, slabs", [(8, 1, 1, 1), (8, 4, 2, 2), (8, 64, 2, 8), (1, 4, 1, 1)])
def test_the_plan_follows_heads_and_memory(monkeypatch, heads, size, at_once, slabs):
    """Small calls keep to one slab; large ones run at once as long as their memory is bounded."""
    monkeypatch.setattr(chunks, "SMALLEST_SHARE", 1 << 20)
    monkeypatch.setitem(chunks.SLAB_BYTES, "cpu", 9 << 19)
    plan = schedule((512 * size - 64,), None, 64, 12, False, torch.device("cpu"))
    q, v = torch.zeros(1, heads, 64), torch.zeros(1, heads, 64)
    with workspace.recycled():
        ranges, together = chunks.slab_heads(q, v, plan)
    assert (together, len(ranges)) == (at_once, slabs)
    assert [h for heads in ranges for h in range(heads.start, heads.stop)] == list(range(heads))
    assert chunks.slab_heads(q, v, plan)[1] == 1  # a graph of autograd is recorded by its own thread


def test_results_are_added_in_order():
    order, done = [], []

    def compute(i):
        time.sleep(0.02 * (i % 2 == 0))
        done.append(i)
        return i * i

    threads.run(compute, lambda i, result: order.append((i, result)), range(6), 2)
    assert order == [(i, i * i) for i in range(6)]
    assert done != sorted(done)


@pytest.mark.parametrize("bad", range(4))
def test_an_error_reaches_the_caller_and_the_next_call_works(bad):
    def compute(i):
        if i == bad:
            raise ValueError(f"slab {i}")
        return i

    with pytest.raises(ValueError, match=f"slab {bad}"):
        threads.run(compute, lambda i, result: None, range(4), 2)
    added = []
    threads.run(lambda i: i, lambda i, result: added.append(result), range(4), 2)
    assert added == [0, 1, 2, 3]


def test_a_forked_process_has_threads_of_its_own():
    threads.run(lambda i: i, lambda i, result: None, range(2), 2)
    child = os.fork()
    if child == 0:
        added = []
        threads.run(lambda i: i, lambda i, result: added.append(result), range(4), 2)
        os._exit(0 if added == [0, 1, 2, 3] else 1)
    assert os.waitpid(child, 0)[1] == 0


def default_number() -> int:
    """Return the number of threads of a thread that begins now."""
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def collect(results: list[int]) -> None:
    threads.run(lambda i: i, lambda i, result: results.append(result), range(6), 2)


def test_callers_at_once_leave_the_default_number_of_threads(monkeypatch):
    before = default_number()
    for _ in range(10):
        monkeypatch.setattr(threads, "_teams", {})
        added = [[] for _ in range(4)]
        callers = [
            threading.Thread(
                target=threads.run, args=(lambda i: i, lambda i, result, a=a: a.append(result), range(6), 2)
            )
            for a in added
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert added == [list(range(6))] * 4
        assert default_number() == before


def test_a_thread_that_cannot_start_leaves_the_default_and_the_result(monkeypatch):
    before, start, started = default_number(), threading.Thread.start, []

    def refuse(thread):
        if thread.name.startswith("loglinear"):
            started.append(thread)
            if len(started) == 2:
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threads, "_teams", {})
    monkeypatch.setattr(threading.Thread, "start", refuse)
    added = []
    threads.run(lambda i: i, lambda i, result: added.append(result), range(4), 2)
    monkeypatch.setattr(threading.Thread, "start", start)
    assert added == [0, 1, 2, 3] and len(started) == 2
    assert default_number() == before and not threads._teams


def test_sizes_in_turn_keep_their_threads():
    torch.set_num_threads(4)
    for size in (2, 4):
        threads.run(lambda i: i, lambda i, result: None, range(4), size)
    before = threading.active_count()
    for size in (2, 4, 2, 4):
        threads.run(lambda i: i, lambda i, result: None, range(4), size)
    assert threading.active_count() == before


SCRIPT = """
import threading, time
import torch
from loglinear.kernels.torch import threads
torch.set_num_threads(2)
if {warm}:
    threads.run(lambda i: i, lambda i, result: None, range(4), 2)
def late():
    time.sleep(0.5)
    added = []
    threads.run(lambda i: i, lambda i, result: added.append(result), range(4), 2)
    print(added)
threading.Thread(target=late).start()
"""


@pytest.mark.parametrize("warm", [False, True])
def test_a_thread_works_on_after_the_main_thread(warm):
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(warm=warm)], capture_output=True, text=True)
    assert done.stdout == "[0, 1, 2, 3]\n", done.stderr

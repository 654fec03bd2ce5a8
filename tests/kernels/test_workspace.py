"""Recycled memory holds no two tensors at a time, and changes no bit of a result."""

import os
import threading

import pytest
import torch

from loglinear.kernels.torch import chunks, workspace
from tests.ops.operators import OPERATORS, gradients, parts

LARGE = (1, workspace.SMALLEST)  # float32: four times the smallest that is recycled


@pytest.fixture(autouse=True)
def _own_blocks(monkeypatch):
    monkeypatch.setattr(workspace, "_own", workspace._Blocks())


def fresh():
    return workspace.empty(torch.zeros(1), *LARGE)


def test_memory_is_used_again_once_no_tensor_lies_in_it():
    with workspace.recycled():
        x = fresh()
        first, row = x.data_ptr(), x[0].view(2, -1)[1:]  # a view of a view holds its memory too
        del x
        assert fresh().data_ptr() != first
        assert row.data_ptr() % workspace.ALIGNMENT == 0
        del row
        assert fresh().data_ptr() == first


def test_what_a_graph_has_saved_is_not_written_over():
    leaf = torch.ones(LARGE, requires_grad=True)
    with workspace.recycled():
        loss = (leaf * fresh().fill_(3.0)).sum()
        for _ in range(3):
            fresh().fill_(-1.0)
        loss.backward()
    assert leaf.grad.eq(3).all()


def test_nested_calls_share_no_memory():
    with workspace.recycled():
        outer = fresh().fill_(1.0)
        with workspace.recycled():
            inner = fresh().fill_(2.0)
        after = fresh().fill_(3.0)
        assert [float(x.mean()) for x in (outer, inner, after)] == [1.0, 2.0, 3.0]
    assert fresh()._base is None  # outside it is a tensor as any other


def test_the_limit_bounds_what_is_kept(monkeypatch):
    size = 4 * LARGE[1] + workspace.ALIGNMENT
    monkeypatch.setattr(workspace, "LIMIT", 2 * size)
    with workspace.recycled():
        held = [fresh().fill_(i) for i in range(4)]
        assert [float(x.mean()) for x in held] == [0.0, 1.0, 2.0, 3.0]
        assert sum(map(len, workspace._own.blocks)) <= 2 * size
        del held
        workspace.empty(torch.zeros(1), 1, LARGE[1] // 4)  # too small for them: they make room
        assert sum(map(len, workspace._own.blocks)) <= 2 * size


def problem(operator):
    torch.manual_seed(1)
    return operator.inputs(B=1, T=150, G=2, H=4, K=32, V=64, L=6, dtype=torch.float32)


def outcome(operator, inputs):
    output, state = operator(inputs, impl="torch", chunk_size=32, output_final_state=True)
    tensors = [output, *parts(state).values()]
    return [*tensors, *gradients(tensors, tuple(map(torch.cos, tensors)), list(inputs.values()))]


def plain(monkeypatch, operator, inputs):
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "SMALLEST", 1 << 60)
        return outcome(operator, inputs)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
@pytest.mark.parametrize("slab_bytes", [1, 9 << 20])
def test_results_are_bit_equal_and_nobody_else_writes_in_them(monkeypatch, operator, slab_bytes):
    monkeypatch.setattr(workspace, "SMALLEST", 1)
    monkeypatch.setitem(chunks.SLAB_BYTES, "cpu", slab_bytes)
    inputs = problem(operator)
    expected = plain(monkeypatch, operator, inputs)
    first = outcome(operator, inputs)
    assert workspace._own.blocks  # it is recycled at all
    for _ in range(2):
        assert same(outcome(operator, inputs), expected)
    assert same(first, expected)
    with torch.inference_mode():
        operator(inputs, impl="torch", chunk_size=32)
    assert same(outcome(operator, inputs), expected)


def test_threads_have_memory_of_their_own(monkeypatch):
    monkeypatch.setattr(workspace, "SMALLEST", 1)
    operator, results = OPERATORS[0], [[] for _ in range(4)]
    inputs = [{n: (x * (i + 1) / 4).detach().requires_grad_() for n, x in problem(operator).items()} for i in range(4)]
    expected = [plain(monkeypatch, operator, x) for x in inputs]

    def work(i):
        results[i] = [outcome(operator, inputs[i]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert len(results[i]) == 5 and all(same(result, expected[i]) for result in results[i])


def test_a_forked_process_writes_in_memory_of_its_own():
    with workspace.recycled():
        mine = fresh().fill_(1.0)
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # GNU OpenMP's threads are not forked, and an operation would wait for them
            mine.fill_(2.0)
            fresh().fill_(3.0)
            os._exit(0 if bool(mine.eq(2).all()) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert mine.eq(1).all()

"""Results that follow from tensors which nobody changes: made once, never confused, gone with their tensor."""

import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loglinear.kernels import unchanging as module
from loglinear.kernels.unchanging import MOST, is_unchanging, is_zero, once, unchanging


class Box:
    """A result that can be referred to weakly."""

    def __init__(self, *tensors):
        self.values = [None if x is None else x.tolist() for x in tensors]


def made(name, *tensors):
    return once(lambda: Box(*tensors), name, *tensors)


def number(x=3):
    return torch.tensor([x])


def test_a_result_is_made_once_for_a_name_and_tensors():
    x, y = unchanging(number()), unchanging(number())
    first = made("a", x, y)
    assert made("a", x, y) is first
    others = [made("b", x, y), made("a", x), made("a", y, x), made("a", y), made("a", x, None)]
    assert len({id(box) for box in (first, *others)}) == 6


def test_a_tensor_at_the_same_address_is_another_one():
    x = unchanging(number())
    view = unchanging(x.view(1))
    assert view.data_ptr() == x.data_ptr() and not is_unchanging(x.detach())
    assert made("a", view) is not made("a", x)
    y = unchanging(number())
    assert made("pair", y, x) is not made("pair", y, view)


def test_a_tensor_in_the_memory_of_a_dead_one_is_another_one():
    memory = bytearray(8)
    first = unchanging(torch.frombuffer(memory, dtype=torch.int64))
    address, known = first.data_ptr(), made("a", first)
    del first
    again = unchanging(torch.frombuffer(memory, dtype=torch.int64))
    assert again.data_ptr() == address and made("a", again) is not known


@pytest.mark.parametrize("own", [0, 1, 2])
def test_a_tensor_of_a_caller_may_change(own):
    """Also without a trace in its version."""
    tensors = [unchanging(number()) if place < own else number() for place in range(2)]
    before = made("a", *tensors)
    tensors[1].data[0] = 5
    assert (made("a", *tensors) is before) == (own == 2)
    assert own == 2 or made("a", *tensors).values[1] == [5]


def test_results_die_with_their_tensor():
    x, y = unchanging(number()), unchanging(number())
    results = [weakref.ref(made(name, x, y)) for name in "ab"]
    other = weakref.ref(y)
    del y
    assert other() is not None and all(result() is not None for result in results)
    del x
    gc.collect()
    assert other() is None and all(result() is None for result in results)


def test_a_tensor_has_few_results():
    x = unchanging(number())
    for name in range(3 * MOST):
        assert made(name, x) is made(name, x)
    assert len(x.layouts) <= MOST


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


def test_modes_and_transforms_take_and_leave_nothing():
    x = unchanging(number())
    before = made("a", x)
    with Mode():
        inside = made("a", x)
        assert inside is not before and made("b", x) is not made("b", x)
        assert not is_unchanging(unchanging(number()))
    assert made("a", x) is before and "b" not in x.layouts

    def twice(y):
        assert not is_unchanging(x)
        return 2 * y

    assert torch.vmap(twice)(number()).tolist() == [6]


def test_a_graph_of_a_compiler_takes_and_leaves_nothing():
    x, seen = unchanging(number()), []
    before = once(lambda: x + 1, "a", x)

    def call(y):
        return once(lambda: x + 1, "a", x) + unchanging(y)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    y = number()
    seen += [compiled(y), compiled(y)]
    assert [z.tolist() for z in seen] == [[7], [7]]
    assert not is_unchanging(y) and once(lambda: x + 1, "a", x) is before


def test_streams_and_recordings_share_nothing(monkeypatch):
    """An origin is the stream and whether a CUDA graph records it."""
    origin = [(0, False)]
    monkeypatch.setattr(module, "_origin", lambda x: origin[0])
    x = unchanging(number())
    before = made("a", x)
    for other in ((7, False), (0, True), (7, True)):
        origin[0] = other
        assert made("a", x) is not before and not is_unchanging(x)
        inside = unchanging(number())
        assert made("a", inside) is made("a", inside)
    origin[0] = (0, False)
    assert made("a", x) is before and made("a", inside) is not made("a", inside)


def test_threads_find_a_whole_result():
    x = unchanging(number())
    found = []

    def work():
        for name in range(200):
            box = made(name % 90, x)
            found.append(box.values == [[3]])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found) and len(found) == 800


def test_zeros_are_declared_and_not_guessed():
    x, y = unchanging(torch.zeros(2), is_zero=True), unchanging(torch.zeros(2))
    assert is_zero(x) and not is_zero(y) and not is_zero(torch.zeros(2)) and not is_zero(x.clone())


def test_a_tensor_is_pickled_with_its_results():
    x, y = unchanging(number()), unchanging(number())
    once(lambda: 5, "a", x, y)
    loaded = pickle.loads(pickle.dumps(x))
    assert loaded.tolist() == [3] and once(lambda: 6, "a", loaded, y) == 6


def test_a_result_of_inference_mode_serves_a_call_with_gradients():
    x = unchanging(number())
    with torch.inference_mode():
        scale = once(lambda: x * 2.0, "a", x)
    y = torch.ones(1, requires_grad=True)
    (y * once(lambda: x * 2.0, "a", x)).backward()
    assert y.grad.tolist() == scale.tolist() == [6.0]

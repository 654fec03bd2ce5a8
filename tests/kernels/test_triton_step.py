"""A step of impl="triton" starts its kernel by itself, unless something records or transforms the call."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loglinear.ops import DecodeState, log_linear_attention_step, log_linear_delta_rule_step
from loglinear.partition import FENWICK, Partition
from tests.kernels.interpreter import teach_interpreter


class Names(TorchDispatchMode):
    """Collect the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.interpreter
@pytest.mark.parametrize("partition", [FENWICK, Partition(4, 16)], ids=str)
def test_a_step_is_the_same_with_and_without_the_dispatcher(operator, partition, monkeypatch):
    """A mode sees an operator. Without a mode none is dispatched, and the state's version numbers move as well."""
    pytest.importorskip("triton")
    teach_interpreter(monkeypatch.setattr)
    step = log_linear_delta_rule_step if operator.delta else log_linear_attention_step
    inputs = {name: x.detach().float() for name, x in operator.inputs(T=15).items()}
    options = dict(chunk_size=16, output_final_state=True, partition=partition)
    final = operator(inputs, impl="torch", **options).final_state
    results = []
    for mode in (contextlib.nullcontext(), Names()):
        state = DecodeState.of(final)
        before = [x._version for x in state.fenwick.tensors]
        with torch.profiler.profile() as profile, mode:
            tokens = [[inputs[name][:, t] for name in operator.names] for t in (0, 1)]
            outputs = [step(*token, state, impl="triton") for token in tokens]
        dispatched = any(event.key == "loglinear::step" for event in profile.key_averages())
        assert dispatched == isinstance(mode, Names)
        moved = [x._version - version for x, version in zip(state.fenwick.tensors, before, strict=True)]
        *written, first = moved  # a step never changes where its sequence began
        assert min(written) > 0 and first == 0
        results.append([*outputs, *state.fenwick.tensors])
    assert "loglinear.step.default" in mode.names
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)

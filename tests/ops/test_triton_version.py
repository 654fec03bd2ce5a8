"""A Triton that cannot compile the kernels is named: impl="auto" does without it and says so, impl="triton" raises."""

import logging

import pytest
import torch
from torch._subclasses import FakeTensorMode

from loglinear.cli import info
from loglinear.ops import (
    DecodeState,
    announcement,
    api,
    impl_triton,
    log_linear_attention_step,
    log_linear_delta_rule_step,
    step,
)
from tests.ops.operators import SCALAR_GATES
from tests.ops.test_step import sizes, take_step


@pytest.fixture(params=SCALAR_GATES, ids=lambda operator: operator.name)
def operator(request):
    return request.param


@pytest.fixture
def log(caplog, monkeypatch):
    """The lines of the logger `loglinear`, as if nothing had run before."""
    monkeypatch.setattr(announcement, "_announced", set())
    caplog.set_level(logging.INFO, "loglinear")
    return lambda: [record.getMessage() for record in caplog.records]


def install(monkeypatch, version):
    monkeypatch.setattr(impl_triton, "NO_TRITON", impl_triton._no_triton(version))


def on_a_gpu(inputs):
    """In FakeTensorMode, without a GPU: tensors that have shapes and a device, but no numbers."""
    return {name: torch.empty(x.shape, device="cuda") for name, x in inputs.items()}


@pytest.mark.parametrize("version", ["2.3.1", "3.3.0", "3.3.1+git1234567"])
def test_an_old_triton_is_one_clear_line(operator, version, monkeypatch):
    install(monkeypatch, version)
    inputs = operator.inputs(B=1, T=20, L=8, dtype=torch.float32)
    text = f"impl='triton' needs Triton 3.4 or newer (it comes with torch 2.8), got {version}; use impl='torch'"
    with pytest.raises(ValueError) as error:
        operator(inputs, impl="triton")
    assert str(error.value) == text
    state = DecodeState.of(sizes(operator, 1, 8, 16))
    with pytest.raises(ValueError) as error:
        take_step(operator, {name: x[:, :1].detach() for name, x in inputs.items()}, state, impl="triton")
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("version", "need"), [(None, "the package triton"), ("3.3.1", "Triton 3.4 or newer")], ids=["none", "old"]
)
def test_auto_does_without_it_and_says_why(operator, version, need, monkeypatch, log):
    install(monkeypatch, version)
    monkeypatch.setitem(api._RUN, "torch", lambda problem: (problem.v, None))
    with FakeTensorMode():
        inputs = on_a_gpu(operator.inputs(B=1, T=20, L=8))
        for _ in range(2):
            assert operator(inputs).output is inputs["v"]
    (line,) = log()
    assert f"runs with impl='torch': impl='triton' needs {need}" in line


def test_a_step_says_why_it_does_without_it(operator, monkeypatch, log):
    install(monkeypatch, "3.3.1")
    monkeypatch.setattr(step, "_torch_step", lambda token: token.v)
    with FakeTensorMode():
        token = on_a_gpu({name: x[:, 0] for name, x in operator.inputs(B=1, T=1, L=8).items()})
        state = DecodeState.zeros(
            1,
            num_levels=8,
            chunk_size=16,
            groups=2,
            heads=4,
            key_dim=5,
            value_dim=3,
            delta_rule=operator.delta,
            device="cuda",
        )
        function = log_linear_delta_rule_step if operator.delta else log_linear_attention_step
        for _ in range(2):
            assert function(*token.values(), state) is token["v"]
    (line,) = log()
    assert "_step runs with impl='torch': impl='triton' needs Triton 3.4 or newer" in line


def test_a_cpu_needs_no_reason(operator, log):
    operator(operator.inputs(B=1, T=20, L=8))
    (line,) = log()
    assert line.endswith("runs with impl='torch'")


@pytest.mark.parametrize("version", ["3.4.0", "3.4.0+git663e04e8", "3.10.0", "4.0.0"])
def test_newer_ones_serve(version):
    assert impl_triton._no_triton(version) is None


def test_info_says_it(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    install(monkeypatch, "3.3.1")
    info.run(None, None)
    assert "no: it needs Triton 3.4 or newer (it comes with torch 2.8), got 3.3.1" in capsys.readouterr().out

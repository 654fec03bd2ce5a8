"""A launcher starts the kernel that Triton would start, and asks Triton only when it has to."""

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.launches_without_device import CASES  # noqa: E402
from tests.kernels.without_device import report_of  # noqa: E402

KNOWN = {"the same", "aligned again", "other stream"}  # these start a kernel that an earlier case has started


@pytest.fixture(scope="module")
def report():
    return report_of("launches_without_device")


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_that_of_triton(report, case):
    """Also its stream, its grid and every value that it is given."""
    first, second, by_triton = report["cases"][case]["starts"]
    assert first == second == by_triton
    assert by_triton["stream"] == CASES[case].get("stream", 0) and by_triton["device"] == CASES[case].get("device", 0)


def test_each_specialisation_has_a_kernel(report):
    kernels = {case: report["cases"][case]["starts"][0]["kernel"] for case in CASES if case not in KNOWN}
    assert kernels.pop("length 1") == kernels["first"]  # Triton does not specialise it
    assert len(set(kernels.values())) == len(kernels)
    assert {report["cases"][case]["starts"][0]["kernel"] for case in KNOWN} == {kernels["first"]}


@pytest.mark.parametrize("case", CASES)
def test_triton_is_asked_once(report, case):
    assert report["cases"][case]["by_triton"] == (0 if case in KNOWN else 1)


@pytest.mark.parametrize("case", ["hook", "replaced"])
def test_who_watches_launches_sees_all(report, case):
    assert report["cases"][case]["by_triton"] == 2
    assert report["cases"]["no hook"]["by_triton"] == 0 and report["hooked"] == 3


@pytest.mark.interpreter
def test_the_interpreter_gets_the_kernel_itself():
    from triton.runtime.interpreter import InterpretedFunction

    from loglinear.kernels.triton.scalar_gate.step import step_kernel
    from tests.kernels.launches_without_device import Pair, copy_kernel, tensor

    assert isinstance(step_kernel, InterpretedFunction) and isinstance(copy_kernel, InterpretedFunction)
    source, out = torch.arange(128.0), tensor()
    copy_kernel[(4,)](Pair(source, 1), out, 100, SIZE=32, NEGATE=True)
    assert torch.equal(out[:100], -source[:100]) and not out[100:].any()


def test_constants_come_last():
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    from loglinear.kernels.triton.launcher import Launcher

    def wrong_kernel(SIZE: tl.constexpr, out):
        tl.store(out, SIZE)

    with pytest.raises(TypeError, match="the constants of wrong_kernel must be its last parameters"):
        Launcher(JITFunction(wrong_kernel))

"""A repeated call starts the kernels that the call itself would start, with the same values, in arrays of its own."""

import pytest

pytest.importorskip("triton")

from tests.kernels.replays_without_device import CALLS, CHANGES, REFUSED, RUN_AS_THEY_ARE  # noqa: E402
from tests.kernels.without_device import report_of  # noqa: E402


@pytest.fixture(scope="module")
def report():
    return report_of("replays_without_device")


@pytest.mark.parametrize("delta", [False, True], ids=["scalar_gate", "delta_rule"])
@pytest.mark.parametrize("name", CALLS)
def test_a_repeated_call_starts_the_same(report, name, delta):
    """The first call, the recorded one, a repeated one, and one with other tensors; forward and backward."""
    call = report["calls"][f"{name} {delta}"]
    assert call["differences"] == [None] * 4
    assert (call["asked"] > 0) == (name in RUN_AS_THEY_ARE)


def test_views_zeros_and_sums_are_repeated(report):
    assert report["small"] == dict(difference=None, runs=3, is_right=True)


def test_a_call_inside_a_call_is_a_part_of_it(report):
    assert report["nested"] == [[None] * 4] * 3
    assert report["outer"] == [True] * 3


@pytest.mark.parametrize("function", REFUSED)
def test_what_does_more_than_to_launch_runs_each_time(report, function):
    assert report["refused"][function.__name__] == 4


@pytest.mark.parametrize("name", CHANGES)
def test_the_key_has_all_that_decides(report, name):
    is_known = name in ("the same", "other stream")
    assert report["changes"][name] == dict(runs=0 if is_known else 2, stream=CHANGES[name].get("stream", 0))


def test_a_kernel_with_a_hook_is_not_repeated(report):
    assert report["hook"] == dict(with_hook=1, after=0)


@pytest.mark.interpreter
def test_the_interpreter_gets_the_function_itself():
    from loglinear.kernels.triton.replay import replayed

    def function(tensors, scale):
        return tensors

    assert replayed(function) is function

"""The one-token kernels as machine code: no comparison is made of a 16-bit minimum, which ptxas 12.8 gets wrong."""

import re

import pytest

pytest.importorskip("triton")

from tests.kernels.steps_without_device import CASES  # noqa: E402
from tests.kernels.without_device import report_of  # noqa: E402

WRONG = re.compile(r"VIMNMX\.[SU]16x2 R\d+, P\d")  # it writes a predicate besides the minimum


@pytest.fixture(scope="module")
def report():
    return report_of("steps_without_device")


@pytest.mark.parametrize("name", CASES)
def test_no_minimum_decides_a_comparison(report, name):
    for instructions in report[name]:
        assert instructions
        assert [x for x in instructions if WRONG.match(x)] == []


def test_the_wrong_instruction_is_known():
    assert WRONG.match("VIMNMX.S16x2 R15, P0, P0, R68, 0x10, PT")
    assert not WRONG.match("VIMNMX.S16x2 R10, R20, 0x90009, PT")

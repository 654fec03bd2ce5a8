"""The kernels of the routed read's weights as machine code: no tile is too large for the registers."""

import pytest

pytest.importorskip("triton")

from tests.kernels.weights_without_device import CASES  # noqa: E402
from tests.kernels.without_device import report_of  # noqa: E402

CALL = 16  # bytes of stack that the call of an exact division may take


@pytest.fixture(scope="module")
def report():
    return report_of("weights_without_device")


@pytest.mark.parametrize("name", CASES)
def test_no_register_is_spilled(report, name):
    assert set(report[name]) == {"routed_weights", "routed_weights_backward"}
    for registers, stack in report[name].values():
        assert registers < 255 and stack <= CALL

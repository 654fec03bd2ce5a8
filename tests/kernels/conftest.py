"""Fixtures that several tests of kernels share."""

import pytest

from tests.ops.operators import SCALAR_GATES


@pytest.fixture(params=SCALAR_GATES, ids=lambda operator: operator.name)
def operator(request):
    """Each family's operator."""
    return request.param

"""Fixtures that several tests of kernels share."""

import pytest

from tests.ops.operators import OPERATORS


@pytest.fixture(params=OPERATORS, ids=lambda operator: operator.name)
def operator(request):
    """Each family's operator."""
    return request.param

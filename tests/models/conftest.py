from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny_config

from loglinear.models import LogLinearForCausalLM


@pytest.fixture
def make_model() -> Callable[..., LogLinearForCausalLM]:
    def make(dtype: torch.dtype = torch.float64, **options) -> LogLinearForCausalLM:
        torch.manual_seed(0)
        return LogLinearForCausalLM(tiny_config(**options)).to(dtype).eval()

    return make

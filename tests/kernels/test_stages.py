"""Every stage of the kernels against its twin in kernels.torch, under the interpreter and on a GPU."""

import pytest
import torch

from tests.kernels.gate_stages import CASES, make, torch_stages, triton_stages
from tests.ops.operators import excess

triton = pytest.importorskip("triton")
# times the error of the twin in float32
FACTOR = 6
THREE_TF32 = 60  # their rounding is about ten times that of one float32 product


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES)
def test_stages_of_the_scalar_gate(case):
    of = CASES[case]
    x = make(of)
    exact, twin, actual = torch_stages(of, x, torch.float64), torch_stages(of, x, torch.float32), triton_stages(of, x)
    assert exact.keys() == actual.keys()
    found = {name: excess(actual[name], twin[name], exact[name]) for name in actual}
    assert not {name: ratio for name, ratio in found.items() if ratio > FACTOR}


@pytest.mark.gpu
@pytest.mark.parametrize("case", [name for name, of in CASES.items() if of.C <= 64])
def test_compiled_stages_of_the_scalar_gate(case):
    """In float32, whose chunks have at most 64 tokens: three tf32 products for each product."""
    of = CASES[case]
    x = make(of, "cuda")
    exact, twin, actual = torch_stages(of, x, torch.float64), torch_stages(of, x, torch.float32), triton_stages(of, x)
    found = {name: excess(actual[name], twin[name], exact[name]) for name in actual}
    assert not {name: ratio for name, ratio in found.items() if ratio > THREE_TF32}

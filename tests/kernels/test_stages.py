"""Every stage of the kernels against its twin, under the interpreter and on a GPU."""

from dataclasses import replace

import pytest
import torch

from loglinear.ops import FenwickState, log_linear_delta_rule
from tests.kernels.emulation import teach_rounding
from tests.kernels.gate_stages import CASES, make, torch_stages, triton_stages
from tests.kernels.interpreter import teach_interpreter
from tests.ops.operators import excess, parts, relative_error

pytest.importorskip("triton")

from tests.kernels import delta_stages
from tests.kernels.delta_twin import SCALE, to_chunks

# times the error of the twin in float32
FACTOR = 6
THREE_TF32 = 60  # their rounding is about ten times that of one float32 product
# times the error of the twin with bfloat16 factors, or one rounding; under the interpreter at most 0.6
BFLOAT16 = 2


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES)
def test_stages_of_the_scalar_gate(monkeypatch, case):
    teach_interpreter(monkeypatch.setattr)
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


def delta_rule_excesses(case: delta_stages.Case, device: str) -> dict[str, float]:
    """`excess` of every stage of the delta rule, called alone, over a twin whose products have the same factors."""
    stages = delta_stages.Stages(case, delta_stages.make(case, device))
    exact, twin = stages.twin(torch.float64), stages.twin(torch.float32, case.dtype)
    found = {}
    for name, actual in stages.kernels(exact).items():
        is_known = ~exact[name].isnan()
        actual = actual[: len(is_known)].cpu()[is_known]  # a packed layout has more rows
        found[name] = excess(actual, twin[name][is_known].to(case.dtype), exact[name][is_known])
    return found


def in_bfloat16(case: delta_stages.Case) -> delta_stages.Case:
    """Heads of up to 32 numbers and chunks of 16 tokens would be multiplied in tf32: the case with wider heads, and in
    chunks, blocks and sequences of twice the size."""
    if case.C == 16:
        ends, partition = case.ends and tuple(2 * end for end in case.ends), case.partition
        if partition.radix > 2:
            partition = replace(partition, finest_block=2 * partition.finest_block)
        case = replace(case, T=2 * case.T, C=32, ends=ends, partition=partition)
    return replace(case, dtype=torch.bfloat16, K=max(case.K, 40), V=max(case.V, 48))


@pytest.mark.parametrize("case", delta_stages.CASES)
def test_the_twin_is_the_delta_rule(case):
    """Its output, final blocks and gradients are those of the operator in float64."""
    of = delta_stages.CASES[case]
    x = {name: value.double().requires_grad_() for name, value in delta_stages.make(of).items()}
    names, state = ("q", "k", "v", "log_decay", "beta", "level_scales"), None
    if of.starts:
        position = torch.tensor(of.starts) * of.C
        state = FenwickState.zeros(
            len(of.starts),
            num_levels=of.L,
            chunk_size=of.C,
            groups=of.G,
            heads=2 * of.G,
            key_dim=of.K,
            value_dim=of.V,
            delta_rule=True,
            position=position,
            dtype=torch.float64,
            partition=of.partition,
        )._replace(blocks=x["initial"])
    out = log_linear_delta_rule(
        *(x[name] for name in names),
        scale=SCALE,
        impl="torch",
        chunk_size=of.C,
        partition=of.partition,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=None if of.ends is None else torch.tensor(of.ends),
    )
    blocks = parts(out.final_state)["blocks"]
    ((out.output * x["do"]).sum() + (blocks * x["dblocks"]).sum()).backward()
    expected = dict(output=out.output, **{f"d{name}": x[name].grad for name in names})
    twin = delta_stages.Stages(of, delta_stages.make(of)).twin(torch.float64)
    assert relative_error(twin["blocks"], blocks) < 1e-12
    if of.starts:
        assert relative_error(twin["dinitial"], x["initial"].grad[:, :-1]) < 1e-12
    for name, value in expected.items():
        value = to_chunks(of, value[0])
        actual = twin[name].nan_to_num(nan=0.0)
        if name in ("dq", "dk"):
            actual = actual.unflatten(1, (of.G, 2)).sum(2)
        assert relative_error(actual, value) < 1e-12, name


@pytest.mark.interpreter
@pytest.mark.parametrize("case", delta_stages.CASES)
def test_stages_of_the_delta_rule(monkeypatch, case):
    """Each alone, and from inputs that are NaN where nobody may read."""
    teach_interpreter(monkeypatch.setattr)
    found = delta_rule_excesses(delta_stages.CASES[case], "cpu")
    assert not {name: ratio for name, ratio in found.items() if ratio > FACTOR}


@pytest.mark.interpreter
@pytest.mark.parametrize("case", ["packed, with an empty sequence", "halves of a chunk"])
def test_stages_of_the_delta_rule_in_bfloat16(monkeypatch, case):
    teach_interpreter(monkeypatch.setattr)
    teach_rounding(monkeypatch.setattr)
    found = delta_rule_excesses(in_bfloat16(delta_stages.CASES[case]), "cpu")
    assert not {name: ratio for name, ratio in found.items() if ratio > BFLOAT16}


@pytest.mark.gpu
@pytest.mark.parametrize("case", [name for name, of in delta_stages.CASES.items() if of.C <= 64])
def test_compiled_stages_of_the_delta_rule(case):
    """In float32, whose chunks have at most 64 tokens: three tf32 products for each product."""
    found = delta_rule_excesses(delta_stages.CASES[case], "cuda")
    assert not {name: ratio for name, ratio in found.items() if ratio > THREE_TF32}


@pytest.mark.gpu
@pytest.mark.parametrize("case", delta_stages.CASES)
def test_compiled_stages_of_the_delta_rule_in_bfloat16(case):
    found = delta_rule_excesses(in_bfloat16(delta_stages.CASES[case]), "cuda")
    assert not {name: ratio for name, ratio in found.items() if ratio > BFLOAT16}

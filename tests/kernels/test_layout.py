"""Layouts of packed sequences: the layers of a model share one."""

import pytest
import torch

pytest.importorskip("triton")

from loglinear.kernels.triton import layout as scalar_gate
from loglinear.kernels.triton.delta_rule import layout as delta_rule

LAYOUTS = [
    pytest.param(lambda ends, levels=6: scalar_gate.layout(1, 40, 16, levels, ends, None), id="scalar_gate"),
    pytest.param(lambda ends, levels=6: delta_rule.layout(1, 40, 16, levels, ends, None, False), id="delta_rule"),
]


def boundaries():
    return torch.tensor([0, 7, 40])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_calls_with_one_tensor_share_a_layout(layout):
    ends = boundaries()
    first = layout(ends)
    assert layout(ends) is first
    assert layout(ends, levels=7) is not first and layout(boundaries()) is not first
    assert torch.equal(layout(boundaries()).table, first.table)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_that_was_changed_has_another_layout(layout):
    ends = boundaries()
    before = layout(ends).table
    ends[1] = 20
    assert not torch.equal(layout(ends).table, before)
    assert torch.equal(layout(ends).table, layout(ends.clone()).table)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_inference_tensor_has_a_new_layout_each_time(layout):
    """It has no version, so nobody could tell that it was changed."""
    with torch.inference_mode():
        ends = boundaries()
        before = layout(ends).table
        ends[1] = 20
        assert not torch.equal(layout(ends).table, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_continued_sequences_have_a_layout_of_their_own(layout):
    ends = boundaries()
    module = scalar_gate if layout is LAYOUTS[0].values[0] else delta_rule
    rest = () if module is scalar_gate else (False,)
    tables = [module.layout(1, 40, 16, 6, ends, torch.tensor(starts), *rest).table for starts in ([0, 0], [1, 3])]
    assert not torch.equal(*tables)

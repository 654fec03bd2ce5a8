"""Layouts of packed sequences: the layers of a model share one."""

import pickle

import pytest
import torch

from loglinear.layers import Packing

pytest.importorskip("triton")

from loglinear.kernels.triton import layout as scalar_gate
from loglinear.kernels.triton.delta_rule import layout as delta_rule

LAYOUTS = [
    pytest.param(lambda ends, levels=6, starts=None: scalar_gate.layout(1, 40, 16, levels, ends, starts), id="scalar"),
    pytest.param(
        lambda ends, levels=6, starts=None: delta_rule.layout(1, 40, 16, levels, ends, starts, False), id="delta"
    ),
]


def boundaries():
    return torch.tensor([0, 7, 40])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_of_a_model_share_a_layout(layout):
    ends = Packing.from_cu_seqlens(boundaries(), 40, 4).cu_seqlens
    first = layout(ends)
    assert layout(ends) is first
    assert torch.equal(layout(boundaries()).table, first.table)
    assert layout(ends, levels=7) is not first
    assert layout(Packing.from_cu_seqlens(boundaries(), 40, 4).cu_seqlens) is not first


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_of_the_callers_has_a_new_layout_each_time(layout):
    """Nobody can tell that it was changed: neither a collective nor another program leaves a trace."""
    ends = boundaries()
    before = layout(ends).table
    ends.data[1] = 20
    assert not torch.equal(layout(ends).table, before)


def test_a_packing_has_a_tensor_of_its_own():
    ends = boundaries()
    packing = Packing.from_cu_seqlens(ends, 40, 4)
    ends[1] = 20
    assert packing.cu_seqlens.tolist() == [0, 7, 40] and not hasattr(ends, "layouts")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_used_packing_is_pickled(layout):
    packing = Packing.from_cu_seqlens(boundaries(), 40, 4)
    used = layout(packing.cu_seqlens)
    loaded = pickle.loads(pickle.dumps(packing)).cu_seqlens
    assert torch.equal(layout(loaded).table, used.table)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_continued_sequences_have_layouts_of_their_own(layout):
    ends = Packing.from_cu_seqlens(boundaries(), 40, 4).cu_seqlens
    tables = [layout(ends, starts=torch.tensor(starts)).table for starts in ([0, 0], [1, 3])]
    assert not torch.equal(*tables)


def random_lengths(seed, shortest):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, 10 * shortest + 40, (60,), generator=generator)
    lengths[torch.randint(0, 60, (20,), generator=generator)] = 0
    return lengths, torch.randint(0, 9000, (60,), generator=generator)


SEQUENCES = [random_lengths(seed, shortest) for seed, shortest in enumerate([0, 30, 500, 3000, 0])]
SEQUENCES += [  # these need all runs there are, and all but one
    (torch.full((60,), 1), torch.zeros(60, dtype=torch.int64)),
    (torch.full((60,), 17), torch.full((60,), 63)),
    (torch.full((60,), 64 * 16), torch.full((60,), 63)),
]


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize(("lengths", "starts"), SEQUENCES)
def test_tables_hold_every_run_of_the_sweeps_and_few_others(lengths, starts, continued):
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    found = scalar_gate.layout(1, int(ends[-1]), 16, 20, ends, starts if continued else None)
    first = starts if continued else torch.zeros_like(lengths)
    run = 1 << found.tree.tier
    for tier, table in enumerate(found.run_tables):
        real = table[table[:, 1] > 0]
        expected = []
        for n, (z0, own) in enumerate(zip(first.tolist(), (-(-lengths // 16)).tolist(), strict=True)):
            entries = (z0 + own) >> (found.tree.tier * tier)
            begin = z0 >> (found.tree.tier * (tier + 1))
            expected += [[n, number] for number in range(begin, -(-entries // run)) if own]
        assert real[:, [4, 2]].tolist() == expected
        assert len(table) == found.runs[tier]
        if not continued:
            assert len(table) <= len(expected) + min(60, found.chunks >> (found.tree.tier * tier))

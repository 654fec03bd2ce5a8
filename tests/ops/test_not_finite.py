"""NaN and infinities in the operands reach the outputs that the docstrings name, and no others."""

import math

import pytest
import torch

from loglinear.ops import bucket_scores
from loglinear.partition import FENWICK, Partition
from tests.ops.operators import OPERATORS, parts

TIME, TOKEN, CHUNK, HEAD = 53, 29, 8, 1
CUTS = [0, 20, 20, TIME]  # of packed sequences
OF_ITS_TOKEN = ("q", "level_scales")


def chunk_start(impl, size, packed):
    """The first token that may change: of the chunk of TOKEN in its sequence, or TOKEN in the recurrence."""
    begin = 20 if packed else 0
    return TOKEN if impl == "reference" else begin + (TOKEN - begin) // size * size


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("partition", "chunk_size"), [(FENWICK, CHUNK), (Partition(4, 4), 4)], ids=["binary", "radix4"]
)
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_it_reaches_its_token_or_all_from_its_chunk_on(operator, impl, partition, chunk_size, packed, bad):
    clean = {name: x.detach() for name, x in operator.inputs(B=1 if packed else 2, T=TIME, L=6).items()}
    clean["log_decay"][:, TOKEN + CHUNK] = -math.inf  # a full reset, which does not remove it
    options = dict(impl=impl, chunk_size=chunk_size, partition=partition, output_final_state=True)
    options |= dict(cu_seqlens=torch.tensor(CUTS)) if packed else {}
    expected = operator(clean, **options)
    first = chunk_start(impl, chunk_size, packed)
    for name in operator.names:
        if name == "log_decay" and bad != math.nan:
            continue  # infinity is refused, and minus infinity is a full reset
        x = {**clean, name: clean[name].clone()}
        x[name][0, TOKEN, HEAD, ...] = bad
        heads = [2, 3] if name in "qk" else [HEAD]  # two value heads read a group
        result = operator(x, **options)
        lost = ~result.output.isfinite()[0][:, heads].all(-1)
        assert lost[TOKEN].all(), name
        assert name in OF_ITS_TOKEN or lost[TOKEN:].all(), name
        own = [TOKEN] if name in OF_ITS_TOKEN else range(first, TIME)
        kept = torch.ones(result.output.shape[:3], dtype=torch.bool)
        for token in own:
            kept[0, token, heads] = False
        assert torch.equal(result.output[kept], expected.output[kept]), name
        row = 2 if packed else 0  # of the state
        for part, value in parts(result.final_state).items():
            before, other = parts(expected.final_state)[part], torch.ones(len(value), dtype=torch.bool)
            other[row] = False
            assert torch.equal(value[other], before[other]), (name, part)
            assert name not in OF_ITS_TOKEN or torch.equal(value, before), (name, part)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_score_is_lost_as_an_output_is(impl, bad):
    q, k = torch.randn(2, 2, TIME, 3, 5, dtype=torch.float64)
    options = dict(num_columns=8, partition=Partition(4, 4), impl=impl)
    expected = bucket_scores(q, k, **options).scores
    for name in "qk":
        x = {"q": q.clone(), "k": k.clone()}
        x[name][0, TOKEN, HEAD] = bad
        scores = bucket_scores(**x, **options).scores
        kept = torch.ones(scores.shape[:3], dtype=torch.bool)
        kept[0, TOKEN : TOKEN + 1 if name == "q" else TIME, HEAD] = False
        if name == "k" and impl == "torch":
            kept[0, chunk_start(impl, 4, False) : TOKEN, HEAD] = False
        assert torch.equal(scores[kept], expected[kept]), name
        assert not scores[0, TOKEN if name == "q" else TOKEN + 4, HEAD].isfinite().all(), name

"""Sequences that start at positions of their own: layers share what follows from the positions, and nothing changes."""

import pytest
import torch

from loglinear.kernels.unchanging import is_unchanging, unchanging
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.ops import FenwickState, bucket_scores
from loglinear.ops.scores import zero_sums
from loglinear.ops.state import empty_state, is_empty
from loglinear.partition import FENWICK, Partition
from tests.kernels.interpreter import teach_interpreter
from tests.kernels.without_device import report_of
from tests.ops.operators import parts, random_loss

pytest.importorskip("triton")

from tests.kernels.operators_without_device import MODELS  # noqa: E402

STARTS = [3, 1000, 64, 77]
ENDS = [0, 0, 5, 32, 45]
RADIX_4, RADIX_16 = (Partition(4, 16), 8), (Partition(16, 16), 17)
CALLS = [(FENWICK, 9, 4), (FENWICK, 9, 1), (*RADIX_4, 1), (*RADIX_16, 1)]  # with the rows of the batch; 1: packed


@pytest.fixture(scope="module")
def report():
    return report_of("operators_without_device")


@pytest.mark.parametrize("name", MODELS)
def test_positions_take_a_layer_few_operators_more(report, name):
    """They take 1.3 to 1.5 times as many. If each call made its layout, it would be 2.2 to 4.9 times."""
    for plain, starting in zip(*report[name], strict=True):
        assert plain < starting <= 1.7 * plain


def results(call, leaves):
    """Everything that a call returns and its gradients, with weights from a seed."""
    found = call()
    torch.manual_seed(1)
    loss = sum((x * w).sum() for x, w in zip(found, random_loss(*found), strict=True))
    return [*found, *torch.autograd.grad(loss, leaves)]


def assert_same(shared, own):
    assert len(shared) == len(own)
    for x, y in zip(shared, own, strict=True):
        assert torch.equal(x, y)


@pytest.fixture
def _interpreter(monkeypatch):
    teach_interpreter(monkeypatch.setattr)


@pytest.mark.interpreter
@pytest.mark.parametrize(("partition", "columns", "rows"), CALLS, ids=str)
def test_a_shared_empty_state_gives_the_bits_of_any_other(_interpreter, operator, partition, columns, rows):
    """It has no tokens to put in front. Both calls of the shared one find the same layouts."""
    x = operator.inputs(B=rows, T=45 if rows == 1 else 18, G=1, H=1, K=4, V=4, L=columns)
    x = {name: t.detach().float().requires_grad_() for name, t in x.items()}
    sizes = dict(num_levels=columns, chunk_size=16, groups=1, heads=1, key_dim=4, value_dim=4, partition=partition)
    position = torch.tensor(STARTS)
    options = dict(chunk_size=16, partition=partition, impl="triton", output_final_state=True)
    ends = dict(cu_seqlens=unchanging(torch.tensor(ENDS))) if rows == 1 else {}

    def call(make, where):
        state = make(4, position=where, **operator.kind, **sizes)
        assert is_empty(state) == (make is empty_state)
        found = operator(x, initial_state=state, **options, **ends)
        assert not any(is_unchanging(t) for t in found.final_state.tensors)
        return [found.output, *parts(found.final_state).values()]

    leaves, own = list(x.values()), unchanging(position.clone())
    plain = results(lambda: call(FenwickState.zeros, position), leaves)
    with torch.no_grad():
        first = call(empty_state, own)
    assert_same([*first, *plain[len(first) :]], plain)
    assert_same(results(lambda: call(empty_state, own), leaves), plain)


@pytest.mark.interpreter
@pytest.mark.parametrize(("partition", "columns"), [(Partition(2, 16), 6), RADIX_4, RADIX_16], ids=str)
def test_shared_empty_sums_give_the_bits_of_any_other(_interpreter, partition, columns):
    torch.manual_seed(0)
    q, k = (torch.randn(1, 45, 1, 4, requires_grad=True) for _ in range(2))
    sizes = dict(num_columns=columns, partition=partition)
    ends = unchanging(torch.tensor(ENDS))

    def call(position):
        state = zero_sums(4, position=position, groups=1, key_dim=4, **sizes)
        options = dict(initial_state=state, output_final_state=True, cu_seqlens=ends, impl="triton", **sizes)
        found = bucket_scores(q, k, **options)
        return [found.scores, *parts(found.final_state).values()], found.tokens

    position = torch.tensor(STARTS)
    own = unchanging(position.clone())
    plain = results(lambda: call(position)[0], [q, k])
    assert_same(results(lambda: call(own)[0], [q, k]), plain)
    assert torch.equal(call(own)[1], call(position)[1])


@pytest.mark.interpreter
@pytest.mark.parametrize("variant", ["mamba2", "gated_delta_net"])
def test_positions_and_boundaries_may_change_between_calls(_interpreter, variant):
    """In place, with and without a trace: a forward reads them anew."""
    sizes = dict(num_heads=1, num_groups=1, key_dim=4, head_dim=4, num_levels=6, radix=4, finest_block=16)
    config = LogLinearConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, variant=variant, routing="gram", impl="triton", **sizes
    )
    model = LogLinearForCausalLM(config)
    torch.nn.init.normal_(model.model.layers[0].mixer.bucket_weights.proj.weight)
    ids, ends, starts = torch.arange(30)[None] % 20, torch.tensor([0, 12, 30]), torch.tensor([5, 64])

    def logits(ends, starts):
        with torch.no_grad():
            return model(input_ids=ids, cu_seqlens=ends, initial_position=starts).logits

    found = [logits(ends, starts)]
    starts += 11
    found.append(logits(ends, starts))
    starts.data[1] = 900
    ends.data[1] = 15
    found.append(logits(ends, starts))
    for actual, (e, s) in zip(found, [(12, [5, 64]), (12, [16, 75]), (15, [16, 900])], strict=True):
        assert torch.equal(actual, logits(torch.tensor([0, e, 30]), torch.tensor(s)))
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


@pytest.mark.interpreter
def test_a_call_of_its_own_shares_a_layout_with_its_backward(_interpreter, operator, monkeypatch):
    """Without a model, packed or from a state: the boundaries may change before the backward."""
    from loglinear.kernels.triton import layout
    from loglinear.kernels.triton.delta_rule import layout as of_delta_rule

    made = []

    def counted(*arguments, ragged=layout.ragged):
        made.append(arguments)
        return ragged(*arguments)

    for module in (layout, of_delta_rule):
        monkeypatch.setattr(module, "ragged", counted)
    x = operator.inputs(B=1, T=45, G=1, H=1, K=4, V=4, L=9)
    x = {name: t.detach().float().requires_grad_() for name, t in x.items()}
    first = operator(x, chunk_size=16, impl="triton", output_final_state=True).final_state.detach()
    first = first.index_select(torch.zeros(4, dtype=torch.int64))
    for state in (None, first):
        ends = torch.tensor(ENDS)
        out = operator(x, chunk_size=16, impl="triton", cu_seqlens=ends, initial_state=state).output
        before = len(made)
        expected = torch.autograd.grad(out.sum(), list(x.values()), retain_graph=True)
        ends[2] = 30
        assert_same(torch.autograd.grad(out.sum(), list(x.values())), expected)
        assert len(made) == before > 0

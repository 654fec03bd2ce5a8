"""The scores of sequences that start at a position: their own tokens alone count, in float64 with every gradient."""

import io
import pickle
import re

import pytest
import torch

from loglinear.ops import DecodeState, FenwickState, bucket_scores, bucket_scores_step, bucket_tokens
from loglinear.ops.problem import unit_length
from loglinear.ops.scores import zero_sums
from loglinear.partition import FENWICK, Partition
from loglinear.reference import dense_bucket_scores, dense_tokens_TL
from tests.ops.operators import random_loss

PARTITIONS = [Partition(2, 4), Partition(4, 4), Partition(16, 2), FENWICK, Partition(4, 2, 8)]
every_partition = pytest.mark.parametrize("partition", PARTITIONS, ids=str)
both = pytest.mark.parametrize("impl", ["torch", "reference"])
STARTS, G, K = [0, 3, 21, 64], 2, 3
T = 37


def inputs(length=T, rows=4):
    return [torch.randn(rows, length, G, K, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def dense(q, k, columns, partition, starts):
    """Scores [B, T, G, L] and tokens [B, T, L] of the definition, row by row."""
    units = [[unit_length(x[row]).transpose(0, 1) for x in (q, k)] for row in range(len(q))]
    rows = [dense_bucket_scores(*unit, columns, partition, p) for unit, p in zip(units, starts, strict=True)]
    tokens = [dense_tokens_TL(q.shape[1], columns, partition, p) for p in starts]
    return torch.stack(rows).transpose(1, 2), torch.stack(tokens)


def sums_at(starts, columns, partition, **options):
    how = dict(groups=G, key_dim=K, dtype=torch.float64) | options
    return zero_sums(len(starts), num_columns=columns, partition=partition, position=torch.tensor(starts), **how)


def check_equal(leaves, actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    weights = random_loss(expected)
    runs = [torch.autograd.grad(y, leaves, weights, retain_graph=True) for y in (actual, expected)]
    for a, e in zip(*runs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@both
@every_partition
@pytest.mark.parametrize("cuts", [[T], [1, 4, 20, 12]], ids=str)
def test_rows_at_starts_of_their_own_with_every_gradient(partition, cuts, impl):
    """Whole and in pieces."""
    for columns in (1, 2, 6, partition.num_columns(64 + T) + 1):
        leaves, state, found, at = inputs(), sums_at(STARTS, columns, partition), [], 0
        options = dict(num_columns=columns, partition=partition, output_final_state=True, impl=impl)
        for cut in cuts:
            found.append(bucket_scores(*(x[:, at : at + cut] for x in leaves), initial_state=state, **options))
            state, at = found[-1].final_state, at + cut
            assert state.first.tolist() == STARTS and state.position.tolist() == [p + at for p in STARTS]
        expected, tokens = dense(*leaves, columns, partition, STARTS)
        check_equal(leaves, torch.cat([piece.scores for piece in found], 1), expected)
        assert torch.equal(torch.cat([piece.tokens for piece in found], 1), tokens)


@both
@every_partition
def test_packed_sequences_at_starts_of_their_own(partition, impl):
    """One of them has no token in the first piece, and one none at all."""
    ends, starts, columns = [[0, 9, 9, 9, 30], [0, 2, 25, 25, 40]], [21, 6, 3, 64], 7
    q, k = ([x[:, :30], x[:, 30:]] for x in inputs(70, rows=1))
    state, found = sums_at(starts, columns, partition), []
    options = dict(num_columns=columns, partition=partition, output_final_state=True, impl=impl)
    for turn in range(2):
        own = dict(cu_seqlens=torch.tensor(ends[turn]), initial_state=state)
        found.append(bucket_scores(q[turn], k[turn], **own, **options))
        state = found[-1].final_state
    for row, start in enumerate(starts):
        spans = [slice(*e[row : row + 2]) for e in ends]
        scores, tokens = (
            torch.cat([getattr(x, name)[:, s] for x, s in zip(found, spans, strict=True)], 1)
            for name in ("scores", "tokens")
        )
        leaves = [
            torch.cat([part[s] for part, s in zip(x, [(slice(None), s) for s in spans], strict=True)], 1)
            for x in (q, k)
        ]
        if scores.shape[1]:
            expected, held = dense(*leaves, columns, partition, [start])
            torch.testing.assert_close(scores, expected, rtol=1e-11, atol=1e-11)
            assert torch.equal(tokens, held)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@every_partition
@torch.no_grad()
def test_steps_of_rows_at_starts_of_their_own(partition, impl):
    for columns in (1, 2, 6, partition.num_columns(64 + T)):
        q, k = (x.detach() for x in inputs())
        expected, tokens = dense(q, k, columns, partition, STARTS)
        state = DecodeState.of(sums_at(STARTS, columns, partition))
        for t in range(T):
            scores, held = bucket_scores_step(q[:, t], k[:, t], state, num_columns=columns, impl=impl)
            torch.testing.assert_close(scores, expected[:, t], rtol=1e-11, atol=1e-11)
            assert torch.equal(held, tokens[:, t])
        assert state.fenwick.first.tolist() == STARTS


@every_partition
def test_buckets_before_the_first_token_are_empty(partition):
    position = torch.arange(200)
    for columns in (1, 2, 5, 30):
        options = dict(num_columns=columns, partition=partition)
        assert torch.equal(
            bucket_tokens(position, first=torch.tensor(0), **options), bucket_tokens(position, **options)
        )
        for first in (1, 7, 63, 64, 130):
            own = bucket_tokens(position[first:], first=torch.tensor([first]), **options)
            assert torch.equal(own, dense_tokens_TL(200 - first, columns, partition, first))
            assert not bucket_tokens(position[:first], first=torch.tensor(first), **options).any()
    far = torch.tensor([2**61 + 5])
    tokens = bucket_tokens(far, first=far - 9, num_columns=40, partition=partition)
    assert tokens.sum() == 10 and (tokens >= 0).all()


def test_a_state_keeps_its_first_token():
    """Through files, copies, choices of rows and memory that was there before."""
    partition = Partition(4, 4)
    state = sums_at(STARTS, 6, partition)
    state = bucket_scores(*inputs(), num_columns=6, partition=partition, initial_state=state, output_final_state=True)
    state, file = state.final_state.detach(), io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    decode, order = DecodeState.of(state), torch.tensor([2, 2, 1])
    into = DecodeState.of(sums_at([0, 0, 0, 0], 6, partition)).copy_(state)
    for own in (
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(decode)).fenwick,
        decode.fenwick,
        into.fenwick,
    ):
        assert own.first.tolist() == STARTS
    for chosen in (state.index_select(order), decode.index_select(order).fenwick):
        assert chosen.first.tolist() == [21, 21, 3]
    assert DecodeState.zeros(2, **SIZES, position=torch.tensor([5, 1])).fenwick.first.tolist() == [5, 1]
    assert FenwickState.zeros(2, **SIZES).first.tolist() == [0, 0]


SIZES = dict(num_levels=6, chunk_size=4, groups=G, heads=G, key_dim=K, value_dim=K, delta_rule=False)


def test_a_state_without_a_first_token_started_at_0():
    """As states of earlier versions."""
    partition, leaves = Partition(4, 4), [x.detach() for x in inputs()]
    options = dict(num_columns=6, partition=partition)
    state = bucket_scores(*leaves, output_final_state=True, **options).final_state
    old = FenwickState(*state[:-1])
    assert old.first is None
    for other in (old, DecodeState.of(old).fenwick):
        found, expected = (bucket_scores(*leaves, initial_state=s, **options) for s in (other, state))
        assert torch.equal(found.scores, expected.scores) and torch.equal(found.tokens, expected.tokens)


@torch.no_grad()
def test_a_pickled_decode_state_of_earlier_versions_is_one_of_this_version():
    """It takes the contents of other states, and steps."""
    partition, leaves = Partition(4, 4), [x.detach() for x in inputs()]
    options = dict(num_columns=6, partition=partition)
    state = bucket_scores(*leaves, output_final_state=True, **options).final_state
    old = DecodeState.of(state)
    vars(old)["fenwick"] = FenwickState(*old.fenwick[:-1])
    read = pickle.loads(pickle.dumps(old))
    assert read.fenwick.first.tolist() == [0] * 4 and torch.equal(read.fenwick.blocks, state.blocks)
    started = bucket_scores(*leaves, initial_state=sums_at(STARTS, 6, partition), output_final_state=True, **options)
    assert read.copy_(started.final_state).fenwick.first.tolist() == STARTS
    token = [x[:, 0] for x in leaves]
    own, expected = (bucket_scores_step(*token, x, num_columns=6) for x in (read, DecodeState.of(started.final_state)))
    assert all(map(torch.equal, own, expected))


@pytest.mark.parametrize(
    "first, text",
    [
        ([0, 10, 0, 0], "initial_state.first must be from 0 to the position 9, got 10"),
        ([0, 0, -1, 0], "initial_state.first must be from 0 to the position 9, got -1"),
        ([0, 0], "initial_state.first must have shape [N] = [4], got [2]"),
        ([0.0] * 4, "initial_state.first must hold integers, got torch.float32"),
    ],
    ids=str,
)
def test_a_first_token_that_contradicts_the_position_is_refused(first, text):
    partition = Partition(4, 4)
    leaves = [x.detach() for x in inputs(9)]
    options = dict(num_columns=6, partition=partition)
    state = bucket_scores(*leaves, output_final_state=True, **options).final_state
    wrong = FenwickState(*state[:-1], torch.tensor(first))
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        bucket_scores(*leaves, initial_state=wrong, **options)
    with pytest.raises(ValueError, match=f"^{re.escape(text.replace('initial_state', 'state'))}$"):
        DecodeState.of(wrong)


@pytest.mark.parametrize(
    "first, text",
    [
        (3, "first must be a tensor, got int"),
        (torch.tensor([0.5]), "first must hold integers, got torch.float32"),
        (torch.tensor([1, 2, 3]), "first must broadcast to the shape [2] of position, got [3]"),
    ],
    ids=["int", "float", "shape"],
)
def test_a_first_token_that_does_not_fit_its_positions_is_named(first, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        bucket_tokens(torch.tensor([4, 5]), first=first, num_columns=3, partition=Partition(4, 4))


@every_partition
def test_a_start_at_0_changes_no_bit(partition):
    leaves, options = inputs(), dict(num_columns=6, partition=partition)
    plain = bucket_scores(*leaves, **options)
    started = bucket_scores(*leaves, initial_state=sums_at([0] * 4, 6, partition), **options)
    torch.testing.assert_close(started.scores, plain.scores, rtol=0, atol=1e-12)
    assert torch.equal(started.tokens[:1], plain.tokens)


def test_one_graph_returns_the_first_token():
    torch._dynamo.reset()
    partition, leaves = Partition(4, 4), inputs()

    def call(q, k, state):
        options = dict(num_columns=6, partition=partition, output_final_state=True)
        return bucket_scores(q, k, initial_state=state, **options)

    state = sums_at(STARTS, 6, partition)
    found, expected = (f(*leaves, state) for f in (torch.compile(call, fullgraph=True, backend="aot_eager"), call))
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-12, atol=1e-12)
    assert found.final_state.first.tolist() == STARTS and found.final_state.partition == partition

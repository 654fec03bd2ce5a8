"""The kernel of the scores' step under the interpreter: against plain torch and the recurrence in float64."""

import copy
import importlib
import re

import pytest
import torch

from loglinear.layers import Mixer, MixerDecodeState, MixerState, Routing
from loglinear.ops import DecodeState, bucket_scores, bucket_scores_step
from loglinear.ops.announcement import announced
from loglinear.ops.problem import unit_length
from loglinear.ops.scores import zero_sums
from loglinear.partition import FENWICK, Partition
from loglinear.reference import dense_bucket_scores, dense_tokens_TL
from loglinear.variants import HeadSizes
from tests.kernels.interpreter import teach_interpreter
from tests.kernels.score_steps import CASES, full_sums, largest_error, many_carries, queries_and_keys, step_error
from tests.kernels.stepping import blocks_error, decoding

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter
FLOAT32 = 1e-5
every_case = pytest.mark.parametrize("partition, columns", CASES, ids=str)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    teach_interpreter(monkeypatch.setattr)


@every_case
def test_rows_at_positions_of_their_own(partition, columns):
    state = full_sums(partition, many_carries(partition), columns)
    assert largest_error(state, queries_and_keys(state, 2), columns) < FLOAT32


@pytest.mark.parametrize(
    "partition, columns, first, ends",
    [
        (Partition(2, 4), 8, 0, 18),
        (Partition(4, 4), 9, 0, 18),
        (Partition(4, 4), 9, 61, 4),
        (Partition(4, 16), 4, 3, 18),  # the prefix takes in blocks of four chunks
        (Partition(16, 1), 32, 253, 5),
        (Partition(4, 4, 16), 8, 10, 24),  # blocks of four chunks stay apart, until there are seven
    ],
    ids=str,
)
def test_the_ends_of_many_chunks(partition, columns, first, ends):
    C = partition.finest_block
    state = full_sums(partition, [C * first + C - 1], columns)
    exact, actual = decoding(state), decoding(state, torch.float32)
    for token in queries_and_keys(state, ends):
        assert step_error(exact, actual, token, columns) < FLOAT32
        for one in (exact, actual):
            one.fenwick.position.add_(C - 1)


@every_case
def test_rows_that_began_at_positions_of_their_own(partition, columns):
    """Each row inside of a bucket, at its end, or with the last token."""
    positions = many_carries(partition)
    first = [p * i // len(positions) for i, p in enumerate(positions)]
    for began in (first, [max(0, p - partition.finest_block) for p in positions], positions):
        state = full_sums(partition, positions, columns, first=began)
        assert largest_error(state, queries_and_keys(state, 2), columns) < FLOAT32
    active = torch.tensor([True, False] * (len(positions) // 2))
    assert largest_error(state, queries_and_keys(state, 2), columns, active=active) < FLOAT32


@pytest.mark.parametrize("start", [3, 21, 64, 1000])
@pytest.mark.parametrize("partition", [Partition(2, 4), Partition(4, 4), Partition(16, 2)], ids=str)
def test_steps_from_a_start_are_the_definition(partition, start):
    T, columns = 41, 9
    q, k = torch.randn(2, 1, T, 2, 5, dtype=torch.float64)
    units = [unit_length(x[0]).transpose(0, 1) for x in (q, k)]
    expected = dense_bucket_scores(*units, columns, partition, start).transpose(0, 1)
    sizes = dict(num_columns=columns, groups=2, key_dim=5, partition=partition)
    state = DecodeState.of(zero_sums(1, position=torch.tensor([start]), **sizes))
    tokens = dense_tokens_TL(T, columns, partition, start)
    for t in range(T):
        step = dict(num_columns=columns, impl="triton")
        scores, held = bucket_scores_step(q[:, t].float(), k[:, t].float(), state, **step)
        torch.testing.assert_close(scores[0].double(), expected[t], rtol=1e-5, atol=1e-5)
        assert torch.equal(held[0], tokens[t])


@pytest.mark.parametrize("partition", [FENWICK, Partition(4, 4), Partition(2, 4, 16)], ids=str)
def test_a_walk_from_nothing(partition):
    """Every token of a sequence, against the whole of it."""
    T = 8 * partition.finest_block + 13
    q, k = torch.randn(2, 1, T, 2, 5, dtype=torch.float64)
    columns = partition.num_columns(T // 2)
    options = dict(num_columns=columns, partition=partition, impl="reference", output_final_state=True)
    whole = bucket_scores(q, k, **options)
    state = full_sums(partition, [0], columns, groups=2, key_dim=5)
    actual = decoding(state, torch.float32)
    for t in range(T):
        step = dict(num_columns=columns, impl="triton")
        scores, tokens = bucket_scores_step(q[:, t].float(), k[:, t].float(), actual, **step)
        torch.testing.assert_close(scores.double(), whole.scores[:, t], rtol=1e-5, atol=1e-5)
        assert torch.equal(tokens, whole.tokens[:, t])
    assert blocks_error(actual, DecodeState.of(whole.final_state)) < FLOAT32


@pytest.mark.parametrize("partition, columns", [(Partition(4), 14), (Partition(16, 16, 16), 9)], ids=str)
@pytest.mark.parametrize("programs", [1, 20, 264])
def test_groups_and_wide_heads(partition, columns, programs, monkeypatch):
    """One program for each group, or several, of which the last adds the parts."""
    monkeypatch.setattr(importlib.import_module("loglinear.kernels.triton.step"), "PROGRAMS", programs)
    C = partition.finest_block
    for G, K in ((3, 20), (1, 70)):
        state = full_sums(partition, [C * 2 - 1, C * 16 - 1], columns, groups=G, key_dim=K)
        assert largest_error(state, queries_and_keys(state, 1), columns) < FLOAT32


def test_against_the_recurrence():
    partition, columns = Partition(4, 4), 7
    state = full_sums(partition, many_carries(partition), columns, groups=2)
    state.blocks.copy_(state.blocks @ state.blocks.mT)
    exact, actual = decoding(state), decoding(state, torch.float32)
    for token in queries_and_keys(state, 9):
        assert step_error(exact, actual, token, columns, impl="reference") < FLOAT32


def test_rows_that_are_not_active_keep_their_state():
    partition, columns = Partition(4, 16), 8
    state = full_sums(partition, [16 * 16 - 1] * 3, columns)
    exact, actual = decoding(state), decoding(state, torch.float32)
    before = [x.clone() for x in actual.fenwick.tensors]
    for mask in ([True, False, False], [True, True, False]):
        active, (q, k) = torch.tensor(mask), queries_and_keys(state, 1)[0]
        q[~active] = k[~active] = torch.nan
        assert step_error(exact, actual, (q, k), columns, active=active) < FLOAT32
    assert all(torch.equal(x[2], old[2]) for x, old in zip(actual.fenwick.tensors, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_tokens_are_those_numbers(dtype):
    partition, columns = Partition(4, 16), 8
    state = full_sums(partition, [16 * 16 - 1, 16 * 5 + 7], columns)
    tokens = [(q.to(dtype), k.to(dtype)) for q, k in queries_and_keys(state, 2)]
    assert largest_error(state, tokens, columns) < FLOAT32


def test_queries_and_keys_that_are_views_or_of_length_0():
    partition, columns = Partition(4, 4), 6
    state = full_sums(partition, [3, 15, 40], columns, groups=2)
    together = torch.randn(3, 12, 2, 3, dtype=torch.float64)
    q, k = together[:, :6].permute(0, 2, 1, 3)[..., 0], together[:, 6:].permute(0, 2, 1, 3)[..., 1]
    q[0], k[1] = 0, 0
    assert largest_error(state, [(q, k), (k, q)], columns) < FLOAT32


def test_two_runs_give_the_same_bits_and_one_graph():
    """In one graph of torch.compile too."""
    torch._dynamo.reset()
    partition, columns = Partition(4, 16), 8
    state = full_sums(partition, [16 * 16 - 1, 16 * 5 + 7], columns, key_dim=40)
    tokens, results = queries_and_keys(state, 2), []
    compiled = torch.compile(bucket_scores_step, backend="aot_eager", fullgraph=True)
    for run in (bucket_scores_step, bucket_scores_step, compiled):
        decode = decoding(state, torch.float32)
        found = [run(q.float(), k.float(), decode, num_columns=columns, impl="triton") for q, k in tokens]
        results.append([*(x for step in found for x in step), *decode.fenwick.tensors])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_is_one_operator_for_torch():
    from loglinear.kernels.triton.bucket_scores.step import operator

    state = full_sums(Partition(4, 16), [16 * 16 - 1, 16 * 5 + 7], 8)
    arrays = decoding(state, torch.float32).fenwick
    (q, k), active = queries_and_keys(state, 1)[0], torch.tensor([True, False])
    parts = (arrays.position, arrays.blocks, arrays.k, arrays.v, arrays.first)
    torch.library.opcheck(operator, (q.float(), k.float(), active, *parts, 8, [4, 16]))


def test_what_was_not_written_is_not_read(monkeypatch):
    def poisoned(*args, empty=torch.empty, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan if x.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", poisoned)
    state = full_sums(Partition(4, 4), [0, 5, 63], 9, groups=2, key_dim=40)
    assert largest_error(state, queries_and_keys(state, 3), 9, active=torch.tensor([True, False, True])) < FLOAT32


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(key_dim=260), "head dims K = 260, V = 260 need impl='torch': impl='triton' takes up to 256 and 256"),
        (dict(dtype=torch.float64), "float64 needs impl='torch'"),
        (
            dict(columns=1026),
            "sums of 1025 blocks need impl='torch': the step of impl='triton' takes up to 1024",
        ),
    ],
    ids=["width", "dtype", "blocks"],
)
def test_a_step_that_the_kernel_does_not_take_is_named(change, text):
    columns = change.pop("columns", 5)
    dtype = change.pop("dtype", torch.float32)
    state = full_sums(Partition(2, 1, 1), [7], columns, **change)
    decode, (q, k) = decoding(state, dtype), queries_and_keys(state, 1)[0]
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        bucket_scores_step(q.to(dtype), k.to(dtype), decode, num_columns=columns, impl="triton")
    assert decode.fenwick.position.tolist() == [7]


def test_a_row_of_more_numbers_than_the_kernel_counts_is_named(monkeypatch):
    from loglinear.kernels.triton import limits

    monkeypatch.setattr(limits, "MAX_NUMBERS", 4 * 6 * 6)
    state = full_sums(Partition(4, 4), [7], 5)
    text = "a row with 144 numbers in its blocks needs impl='torch': impl='triton' takes less than 144"
    (q, k), decode = queries_and_keys(state, 1)[0], decoding(state, torch.float32)
    with pytest.raises(ValueError, match=f"^{text}$"):
        bucket_scores_step(q.float(), k.float(), decode, num_columns=5, impl="triton")


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("variant", ["mamba2", "gated_delta_net"])
@torch.no_grad()
def test_a_routed_layer_decodes_with_the_kernels_alone(variant, top_k):
    """A prompt in float64, then steps in float64 by torch and in float32 by both kernels."""
    heads, partition = HeadSizes(num_heads=2, num_groups=1, key_dim=5, head_dim=3), Partition(4, 16)
    options = dict(variant=variant, num_levels=6, partition=partition, chunk_size=16, routing=Routing(top_k=top_k))
    torch.manual_seed(0)
    exact = Mixer(8, heads, **options).double().eval()
    for p in exact.bucket_weights.parameters():
        torch.nn.init.normal_(p, std=0.5)
    actual = copy.deepcopy(exact).float()
    actual.impl = "triton"
    x = torch.randn(2, 16 * 5 + 19, 8, dtype=torch.float64)
    _, state = exact(x[:, :-8], return_state=True)
    parts = [s.with_tensors(y.float() if y.is_floating_point() else y for y in s.tensors) for s in state[1:]]
    states = MixerDecodeState.of(state), MixerDecodeState.of(MixerState(state.conv.float(), *parts))
    with announced() as lines:
        for t in range(x.shape[1] - 8, x.shape[1]):
            token = x[:, t : t + 1]
            found, expected = actual.step(token.float(), states[1]), exact.step(token, states[0])
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert "bucket_scores_step runs with impl='triton'" in lines

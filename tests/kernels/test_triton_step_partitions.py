"""The one-token kernels with every partition, under the interpreter, against the recurrence in float64."""

import pytest
import torch

from loglinear.ops import DecodeState
from loglinear.partition import FENWICK, Partition
from tests.kernels.interpreter import teach_interpreter
from tests.kernels.stepping import blocks_error, decoding, full_state, sparse_tokens, step_of, tokens_for
from tests.ops.operators import relative_error

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter
FLOAT32 = 5e-5  # most errors are below 2e-6, but the few numbers of one row may cancel

# With the tokens of a chunk and the columns: all of them, few so that the last block is a prefix of several blocks of
# one size, and a chunk's alone.
CASES = [
    (FENWICK, 16, 9),
    (Partition(2, 4), 16, 7),
    (Partition(4), 16, 14),
    (Partition(4, 16), 16, 6),
    (Partition(4, 16), 64, 1),
    (Partition(8, 2), 16, 16),
    (Partition(16), 16, 27),
    (Partition(16, 32), 32, 19),
    (Partition(128, 16), 16, 9),
    (Partition(2, 1, 64), 16, 12),
    (Partition(4, 16, 64), 16, 11),
    (Partition(16, 16, 16), 16, 7),
]
every_case = pytest.mark.parametrize("partition, C, columns", CASES, ids=str)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    teach_interpreter(monkeypatch.setattr)


def compare(operator, states, token, impl="reference", **options):
    """Step a float64 state and a float32 one; the largest error of the output of a row and of a block."""
    exact, actual = states
    expected = step_of(operator)(*token.values(), exact, impl=impl, **options)
    found = step_of(operator)(*(x.float() for x in token.values()), actual, impl="triton", **options)
    errors = [relative_error(y, e) if bool(e.any()) else float(y.norm()) for y, e in zip(found, expected, strict=True)]
    return max(*errors, blocks_error(actual, exact))


@every_case
def test_rows_at_positions_of_their_own(operator, partition, C, columns):
    """Before no carry, before carries of one, two and three digits, and inside of a chunk."""
    r = partition.radix
    chunks = [1, r, r**2, r**3, r**2 + r + 3, 3 * r]
    state = full_state(operator, partition, [C * n - 1 for n in chunks] + [3, C * (r**3 - 1) + C // 2 + 1], columns, C)
    states = decoding(state), decoding(state, torch.float32)
    for token in tokens_for(operator, state, 2, columns):
        assert compare(operator, states, token) < FLOAT32


@pytest.mark.parametrize(
    "partition, columns, first, ends",
    [
        (Partition(2, 16), 8, 0, 18),
        (Partition(4, 16), 11, 0, 18),
        (Partition(4, 16), 11, 61, 4),
        (Partition(4, 16), 6, 3, 18),  # the prefix takes in blocks of four chunks
        (Partition(8, 16), 16, 61, 5),
        (Partition(16, 16), 32, 253, 5),
        (Partition(4, 16, 64), 10, 10, 24),  # blocks of four chunks stay apart, until there are seven
    ],
    ids=str,
)
def test_the_ends_of_many_chunks(operator, partition, columns, first, ends):
    """One chunk after the other fills up; each has the same first tokens. Errors do not add up."""
    C, dims = 16, dict(key_dim=4, value_dim=2)
    state = full_state(operator, partition, [C * first + C - 1], columns, C, **dims)
    if operator.delta:
        state.beta.mul_(0.05)
    states = decoding(state), decoding(state, torch.float32)
    for token in tokens_for(operator, state, ends, columns):
        token = {name: 0.05 * x if name == "beta" else x for name, x in token.items()}
        assert compare(operator, states, token, impl="torch") < FLOAT32
        for one in states:
            one.fenwick.position.add_(C - 1)


def test_a_walk_from_nothing(operator):
    """Every token of a sequence, against the whole of it."""
    partition, columns, T = Partition(4), 12, 16 * 5 + 3
    inputs = operator.inputs(B=1, T=T, G=1, H=1, K=3, V=2, L=columns)
    whole = operator(inputs, chunk_size=16, partition=partition, output_final_state=True)
    sizes = dict(num_levels=columns, chunk_size=16, groups=1, heads=1, key_dim=3, value_dim=2)
    state = DecodeState.zeros(1, partition=partition, delta_rule=operator.delta, **sizes)
    for t in range(T):
        output = step_of(operator)(*(x[:, t].detach().float() for x in inputs.values()), state, impl="triton")
        assert relative_error(output, whole.output[:, t]) < FLOAT32, t
    assert blocks_error(state, decoding(whole.final_state)) < FLOAT32


@pytest.mark.parametrize("partition, columns", [(Partition(4), 14), (Partition(16, 16, 16), 9)], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 20, 18), (1, 1, 70, 5)], ids=str)
def test_groups_wide_heads_scale_and_unit_length(operator, partition, columns, shape):
    """Several tiles of keys and of values, each of which moves blocks."""
    G, H, K, V = shape
    dims = dict(groups=G, heads=H, key_dim=K, value_dim=V)
    options = dict(scale=0.3) | (dict(l2_normalize=True) if operator.delta else {})
    state = full_state(operator, partition, [16 * 2 - 1, 16 * 16 - 1], columns, 16, **dims)
    states = decoding(state), decoding(state, torch.float32)
    for token in tokens_for(operator, state, 2, columns):
        assert compare(operator, states, token, **options) < FLOAT32


@every_case
def test_blocks_whose_lambda_is_0_are_not_read(operator, partition, C, columns):
    r = partition.radix
    state = full_state(operator, partition, [C * r**2 + 3, C * (r + 1), C * (r**3 - 1) + C // 2], columns, C)
    token, poisoned, exact = sparse_tokens(operator, state, columns)
    expected = step_of(operator)(*token.values(), decoding(exact), impl="reference")
    token = [x.float() for x in token.values()]
    found = step_of(operator)(*token, decoding(poisoned, torch.float32), impl="triton", sparse=True)
    assert relative_error(found, expected) < FLOAT32
    states = [decoding(state, torch.float32) for _ in range(2)]
    outputs = [step_of(operator)(*token, s, impl="triton", sparse=i == 1) for i, s in enumerate(states)]
    assert torch.equal(*outputs)


def test_rows_that_are_not_active_keep_their_state(operator):
    partition, columns = Partition(4, 16), 8
    state = full_state(operator, partition, [16 * 16 - 1] * 3, columns, 16)
    states = decoding(state), decoding(state, torch.float32)
    before = [x.clone() for x in states[1].fenwick.tensors]
    for active in ([True, False, False], [True, True, False]):
        token = tokens_for(operator, state, 1, columns)[0]
        token["v"][~torch.tensor(active)] = torch.nan
        assert compare(operator, states, token, active=torch.tensor(active), impl="torch") < FLOAT32
    assert all(torch.equal(x[2], old[2]) for x, old in zip(states[1].fenwick.tensors, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_tokens_cost_one_rounding(operator, dtype):
    partition, columns = Partition(4, 16), 8
    state = full_state(operator, partition, [16 * 16 - 1, 16 * 5 + 7], columns, 16)
    states = decoding(state), decoding(state, torch.float32)
    for token in tokens_for(operator, state, 2, columns):
        rounded = [x.to(dtype) for x in token.values()]
        expected = step_of(operator)(*(x.double() for x in rounded), states[0], impl="reference")
        output = step_of(operator)(*rounded, states[1], impl="triton")
        assert output.dtype == dtype
        assert relative_error(output, expected) < torch.finfo(dtype).eps  # the interpreter cuts bfloat16 off
        assert blocks_error(*reversed(states)) < FLOAT32


def test_two_runs_give_the_same_bits_and_one_graph(operator):
    """In one graph of torch.compile too."""
    torch._dynamo.reset()
    partition, columns = Partition(4, 16), 8
    state = full_state(operator, partition, [16 * 16 - 1, 16 * 5 + 7], columns, 16)
    tokens, results = tokens_for(operator, state, 2, columns), []
    function = step_of(operator)
    for run in (function, function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        decode = decoding(state, torch.float32)
        outputs = [run(*(x.float() for x in token.values()), decode, impl="triton") for token in tokens]
        results.append([*outputs, *decode.fenwick.tensors])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("partition, C", [(Partition(2, 256), 256), (Partition(4, 4), 4), (Partition(16), 1)], ids=str)
def test_a_chunk_that_the_kernels_do_not_take_is_named(operator, partition, C):
    state = decoding(full_state(operator, partition, [5], 6, C), torch.float32)
    token = [x.float() for x in tokens_for(operator, state.fenwick, 1, 6)[0].values()]
    text = f"a state with chunk_size {C} needs impl='torch': impl='triton' takes 16 to 128"
    with pytest.raises(ValueError, match=f"^{text}$"):
        step_of(operator)(*token, state, impl="triton")
    assert state.fenwick.position.tolist() == [5]


def test_a_row_of_more_blocks_than_the_kernels_count_is_named(operator, monkeypatch):
    from loglinear.kernels.triton import limits

    state = decoding(full_state(operator, Partition(4, 16), [5], 6, 16), torch.float32)
    token = [x.float() for x in tokens_for(operator, state.fenwick, 1, 6)[0].values()]
    monkeypatch.setattr(limits, "MAX_NUMBERS", 5 * 6 * 3)  # M = 5, K = 6, V = 3
    text = "a row with 90 numbers in its blocks needs impl='torch': impl='triton' takes less than 90"
    with pytest.raises(ValueError, match=f"^{text}$"):
        step_of(operator)(*token, state, impl="triton")
    monkeypatch.setattr(limits, "MAX_NUMBERS", 91)
    step_of(operator)(*token, state, impl="triton")
    assert state.fenwick.position.tolist() == [6]

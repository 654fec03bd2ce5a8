"""The kernels of the scores of buckets under the interpreter: against float64, with every gradient."""

import pytest
import torch

from loglinear.ops import bucket_scores
from loglinear.ops.problem import unit_length
from loglinear.ops.scores import zero_sums
from loglinear.partition import FENWICK, Partition
from loglinear.reference import dense_bucket_scores, dense_tokens_TL
from tests.kernels.emulation import teach_rounding
from tests.kernels.interpreter import teach_interpreter
from tests.kernels.scores import errors, kernel_runs, make, results_of, state_at
from tests.ops.operators import excess, relative_error

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

FACTOR = 6  # times the error of impl="torch" in float32 in the same test
PARTITIONS = [
    FENWICK,
    Partition(2, 16),
    Partition(4),
    Partition(4, 16),
    Partition(8, 2),
    Partition(16, 16),
    Partition(64, 16),
]
WITH_STATES = [Partition(2, 16), Partition(4, 16), Partition(16, 16)]
every_partition = pytest.mark.parametrize("partition", PARTITIONS, ids=str)
every_state = pytest.mark.parametrize("partition", WITH_STATES, ids=str)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    teach_interpreter(monkeypatch.setattr)


def compare(inputs, **options):
    exact, weights = results_of(inputs, "torch", torch.float64, **options)
    actual, twin = (
        results_of(inputs, impl, torch.float32, weights=weights, **options)[0] for impl in ("triton", "torch")
    )
    for name, e in exact.items():
        times = excess(actual[name], twin[name], e)
        assert times <= FACTOR, (name, times, relative_error(actual[name], e))


def small(T, B=1, G=1, K=4):
    return make(B, T, G, K, torch.float64, device="cpu")


@every_partition
@pytest.mark.parametrize("T", [1, 150])
def test_any_length_and_number_of_columns(partition, T):
    """All columns, and fewer of them, so that blocks of one size or of a chunk share the last one."""
    most = partition.num_columns(T)
    for columns in {max(1, most // 2), most + 2}:
        compare(small(T), num_columns=columns, partition=partition)


@every_partition
def test_packed_sequences(partition):
    cu_seqlens = torch.tensor([0, 1, 40, 40, 72, 200])
    compare(small(200), num_columns=9, partition=partition, cu_seqlens=cu_seqlens)


@every_state
@pytest.mark.parametrize("columns", [1, 2, 30])
def test_the_state_after_a_call(partition, columns):
    compare(small(85), num_columns=columns, partition=partition, final=True)


@every_state
@pytest.mark.parametrize(("start", "columns"), [(37, 5), (16 * 21 + 5, 20), (16 * 70, 8)])
def test_continues_a_state(partition, start, columns):
    """The state's prefix ends at several heights, and among blocks of its own size."""
    state = state_at(start, columns, partition, B=1, device="cpu")
    compare(small(40), num_columns=columns, partition=partition, initial_state=state, final=True)


@every_state
@pytest.mark.parametrize("columns", [1, 2, 5, 20])
@pytest.mark.parametrize(("first", "position"), [(21, 21), (16 * 21 + 5, 16 * 21 + 5), (300, 345), (32, 48)])
def test_sequences_that_began_at_a_position(partition, columns, first, position):
    state = state_at(position, columns, partition, first=first, B=1, device="cpu")
    compare(small(40), num_columns=columns, partition=partition, initial_state=state, final=True)


@every_state
@pytest.mark.parametrize("columns", [1, 2, 5, 20])
def test_sequences_from_starts_of_their_own_are_the_definition(partition, columns):
    """Packed, whole and in pieces, with the gradients of the definition; the state as impl="torch" leaves it."""
    starts, ends = [0, 37, 16 * 21 + 5, 4000], torch.tensor([0, 33, 66, 99, 132])
    leaves = [x.detach().double().requires_grad_() for x in small(132).values()]
    units = [unit_length(x[0]).transpose(0, 1) for x in leaves]
    dense = [
        dense_bucket_scores(*(x[:, 33 * row :][:, :33] for x in units), columns, partition, p)
        for row, p in enumerate(starts)
    ]
    expected = torch.cat(dense, 1).transpose(0, 1)[None]
    at = dict(position=torch.tensor(starts), num_columns=columns, groups=1, key_dim=4)
    state = zero_sums(4, partition=partition, **at)
    narrow = [x.detach().float().requires_grad_() for x in leaves]
    options = dict(num_columns=columns, partition=partition, output_final_state=True)
    found = bucket_scores(*narrow, cu_seqlens=ends, initial_state=state, impl="triton", **options)
    torch.testing.assert_close(found.scores.double(), expected, rtol=1e-4, atol=2e-4)
    weights = torch.randn_like(expected)
    grads = torch.autograd.grad(found.scores, narrow, weights.float()), torch.autograd.grad(expected, leaves, weights)
    for a, e in zip(*grads, strict=True):
        assert relative_error(a, e) < 1e-4
    pieces = [[x.view(4, 33, 1, 4)[:, s] for x in narrow] for s in (slice(0, 7), slice(7, 33))]
    scores, tokens, rows = [], [], state
    for piece in pieces:
        result = bucket_scores(*piece, initial_state=rows, impl="triton", **options)
        scores.append(result.scores)
        tokens.append(result.tokens)
        rows = result.final_state
    whole = found.scores.view(4, 33, 1, columns)
    torch.testing.assert_close(torch.cat(scores, 1), whole, rtol=1e-4, atol=2e-4)
    assert torch.equal(torch.cat(tokens, 1), torch.stack([dense_tokens_TL(33, columns, partition, p) for p in starts]))
    assert rows.first.tolist() == found.final_state.first.tolist() == starts


@every_state
def test_a_start_at_0_changes_no_bit(partition):
    """The kernels give the same without the positions of first tokens."""
    runs = kernel_runs(partition, 345, device="cpu", T=50, K=4)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@every_state
def test_continues_packed_states(partition):
    state = state_at(100, 9, partition, device="cpu")
    options = dict(num_columns=9, partition=partition, cu_seqlens=torch.tensor([0, 45, 45]), initial_state=state)
    compare(small(45), final=partition.radix == 4, **options)


def test_a_query_and_a_key_of_length_0():
    inputs = small(90, B=2)
    with torch.no_grad():
        inputs["q"][:, ::7] = 0
        inputs["k"][:, ::5] = 0
        inputs["q"][:, 1::7] *= 1e-4
    for partition in (Partition(4, 4), Partition(4, 16)):
        compare(inputs, num_columns=7, partition=partition)
    state = state_at(40, 7, partition, device="cpu")
    compare(inputs, num_columns=7, partition=partition, initial_state=state)


@pytest.mark.parametrize("K", [5, 72])
def test_wide_heads_and_groups_that_are_views(K):
    """Several tiles, and queries and keys that are slices of one projection."""
    together = torch.randn(1, 70, 1, 2 * K, dtype=torch.float64)
    inputs = {"q": together[..., :K], "k": together[..., K:]}
    for partition in (Partition(2, 4), Partition(4, 16)):
        compare(inputs, num_columns=8, partition=partition)


def test_readers_in_runs():
    """More than 64 chunks, with radix 16 more than 16."""
    compare(small(16 * 67 + 3, K=2), num_columns=4, partition=Partition(2, 16))
    compare(small(16 * 35 + 3, K=2), num_columns=50, partition=Partition(16, 16))


def test_chunks_of_128_are_read_in_halves():
    """With bfloat16's products; in float32 a finest block of 128 tokens needs impl="torch"."""
    from loglinear.kernels.triton import bucket_scores as kernel

    inputs = make(1, 300, 1, 16, torch.float32, device="cpu")
    partition = Partition(2, 128)
    scores, _ = kernel(*inputs.values(), None, None, None, None, 4, 128, False, partition.numbers)
    weight = torch.randn_like(scores)
    doubles = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    exact = bucket_scores(**doubles, num_columns=4, partition=partition).scores
    assert relative_error(scores, exact) < 1e-6
    found, expected = (
        torch.autograd.grad(y, list(x.values()), weight.to(y.dtype)) for y, x in ((scores, inputs), (exact, doubles))
    )
    for a, e in zip(found, expected, strict=True):
        assert relative_error(a, e) < 2e-6


@pytest.mark.parametrize("lengths", [None, [40, 0, 60]], ids=str)
def test_slabs_of_groups_give_the_same_numbers(lengths, monkeypatch):
    from loglinear.kernels.triton.bucket_scores import inputs as module

    inputs = make(1, 100, 2, 4, torch.float32, device="cpu")
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    options = dict(num_columns=9, partition=Partition(4, 16), cu_seqlens=cu_seqlens, final=True)
    together, weights = results_of(inputs, "triton", torch.float32, **options)
    monkeypatch.setattr(module, "SLAB_BYTES", 1)
    apart, _ = results_of(inputs, "triton", torch.float32, weights=weights, **options)
    for name, x in together.items():
        assert torch.equal(apart[name], x), name


def test_what_was_not_written_is_not_read(monkeypatch):
    def poisoned(empty):
        def full_of_nan(*args, **kwargs):
            x = empty(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return full_of_nan

    exact, weights = results_of(small(245), "torch", torch.float64, num_columns=12, partition=Partition(4, 4))
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    options = dict(num_columns=12, partition=Partition(4, 4), weights=weights)
    actual, _ = results_of(small(245), "triton", torch.float32, **options)
    for name, e in exact.items():
        assert relative_error(actual[name], e) < 2e-6, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_narrow_inputs_are_those_numbers(dtype):
    """16-bit q and k enter the products as they come: the interpreter's are exact."""
    inputs = make(1, 130, 1, 16, dtype, device="cpu")
    found = errors(inputs, dtype, num_columns=6, partition=Partition(4, 16))
    assert found["scores"] < 1e-6
    assert max(found.values()) < (1e-6 if dtype == torch.float32 else 5e-4), found


def test_bfloat16_products(monkeypatch):
    """The branches for bfloat16. A rounding is 2^-9; a sum keeps it small because its mean is not in it."""
    from loglinear.ops import impl_triton

    teach_rounding(monkeypatch.setattr)
    monkeypatch.setattr(impl_triton, "unsupported", lambda p: None)
    inputs = make(1, 300, 1, 64, torch.bfloat16, device="cpu")
    for partition in (Partition(4, 16), Partition(2, 4)):
        found = errors(inputs, torch.bfloat16, num_columns=9, partition=partition)
        assert max(found.values()) < 4e-3, found


def test_the_future_does_not_leak():
    inputs = {name: x.detach().float() for name, x in small(100).items()}
    changed = {name: x.clone() for name, x in inputs.items()}
    for x in changed.values():
        x[:, 53:] = 7.0
    options = dict(num_columns=9, partition=Partition(4, 4), impl="triton")
    found = [bucket_scores(**x, **options).scores[:, :53] for x in (changed, inputs)]
    assert torch.equal(*found)


def test_is_one_node_for_torch():
    from loglinear.kernels.triton import bucket_scores as kernel

    inputs = make(1, 40, 1, 8, torch.float32, device="cpu")
    torch.library.opcheck(kernel, (*inputs.values(), None, None, None, None, 4, 16, True, [4, 16]))

    def call(x):
        options = dict(num_columns=4, partition=Partition(4, 16), output_final_state=True)
        return bucket_scores(**x, impl="triton", **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(inputs)
    plain = call(inputs)
    assert torch.equal(compiled.scores, plain.scores)
    assert torch.equal(compiled.final_state.blocks, plain.final_state.blocks)


def test_second_derivatives_are_those_of_torch():
    inputs = make(2, 40, 1, 4, torch.float32, device="cpu")
    state = state_at(21, 6, Partition(4, 16), device="cpu")
    for start in (None, state):
        found = []
        for impl in ("triton", "torch"):
            leaves = list(inputs.values())
            options = dict(num_columns=6, partition=Partition(4, 16), initial_state=start, impl=impl)
            first = torch.autograd.grad(
                bucket_scores(*leaves, **options).scores.square().sum(), leaves, create_graph=True
            )
            found.append(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))
        for a, b in zip(*found, strict=True):
            assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize(
    "partition, final, text",
    [
        (Partition(128), False, "takes a radix up to 64 without a largest block"),
        (Partition(4, 1, 64), False, "takes a radix up to 64 without a largest block"),
        (Partition(2, 256), False, "with chunks of 256 needs impl='torch'"),
        (Partition(4, 4), True, "a state with chunk_size 4 needs impl='torch'"),
    ],
    ids=str,
)
def test_says_which_calls_it_does_not_take(partition, final, text):
    inputs = make(1, 5, 1, 8, torch.float32, device="cpu")
    options = dict(num_columns=3, partition=partition, impl="triton", output_final_state=final)
    with pytest.raises(ValueError, match=text):
        bucket_scores(**inputs, **options)

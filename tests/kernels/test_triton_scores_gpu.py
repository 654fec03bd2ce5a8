"""The kernels of the scores of buckets on a GPU: every configuration that can be launched, against float64."""

import pytest
import torch

from loglinear.ops import bucket_scores
from loglinear.ops.problem import unit_length
from loglinear.ops.scores import zero_sums
from loglinear.partition import FENWICK, Partition
from loglinear.reference import dense_bucket_scores, dense_tokens_TL
from tests.kernels.scores import (
    EMULATED,
    NARROW,
    SMALL_BLOCK_PARTITIONS,
    SMALL_BLOCKS,
    errors,
    kernel_runs,
    make,
    state_at,
)
from tests.kernels.test_triton_gpu import THREE_TF32, poison, report
from tests.ops.operators import relative_error
from tests.waiting import waiting_is_an_error

pytestmark = pytest.mark.gpu

# Chunks of 64 with and without columns of their own, of 16, and of 128 in halves.
PARTITIONS = [
    FENWICK,
    Partition(2, 64),
    Partition(4, 16),
    Partition(4, 64),
    Partition(8, 64),
    Partition(16, 16),
    Partition(16, 64),
    Partition(64, 16),
    Partition(4, 128),
]
WITH_STATES = [Partition(2, 16), Partition(4, 64), Partition(16, 16), Partition(8, 32)]
HEADS = [(2, 128), (3, 64), (1, 80), (1, 5), (2, 192), (1, 256)]
every_partition = pytest.mark.parametrize("partition", PARTITIONS, ids=str)
every_state = pytest.mark.parametrize("partition", WITH_STATES, ids=str)


def check(inputs, dtype, *, harder=None, **options):
    """The limit is 1.3 times the emulated rounding. Calls that continue are in float32; their gradients are rounded.
    harder: the emulated rounding of calls with larger errors than most."""
    found = errors(inputs, dtype, before=poison, **options)
    report(dtype, found)
    emulated = EMULATED.get(dtype, {}) | (harder or {}).get(dtype, {})
    if "initial_state" in options:
        emulated = {name: error for name, error in emulated.items() if name.startswith("gradient")}
    limits = {name: 1.3 * emulated[name] if name in emulated else THREE_TF32 for name in found}
    exceeded = [f"{name}: {error:.3g} > {limits[name]:.3g}" for name, error in found.items() if error > limits[name]]
    assert not exceeded, "\n".join(exceeded)


def fitting(partition, K, dtype):
    """The same radix in the largest finest block that these products take."""
    largest = (128 if dtype == torch.bfloat16 else 64) // (2 if K > 128 else 1)
    return Partition(partition.radix, min(partition.finest_block, largest))


@every_partition
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_error_of_every_plan(heads, dtype, partition):
    G, K = heads
    options = dict(num_columns=20, partition=fitting(partition, K, dtype))
    check(make(2, 1111, G, K, dtype), dtype, harder=NARROW if K == 5 else None, **options)


@every_partition
@pytest.mark.parametrize("columns", [2, 3, 9, 20, 60])
@pytest.mark.parametrize("T", [1, 127, 193, 4097, 16384])
def test_error_at_every_length(T, columns, partition):
    if T == 1 or partition.num_columns(T) == 1:
        scores = bucket_scores(
            **make(1, T, 2, 128, torch.bfloat16), num_columns=columns, partition=partition, impl="triton"
        ).scores
        assert not scores.any()
        return
    check(make(1, T, 2, 128, torch.bfloat16), torch.bfloat16, num_columns=columns, partition=partition)


@pytest.mark.parametrize("partition", [Partition(2, 64), Partition(4, 64), Partition(16, 64)], ids=str)
def test_error_of_a_long_sequence(partition):
    T = 131072
    columns = partition.num_columns(T)
    check(make(1, T, 1, 128, torch.bfloat16), torch.bfloat16, num_columns=columns, partition=partition)


@every_partition
@pytest.mark.parametrize("columns", [5, 40])
def test_error_of_packed_sequences(columns, partition):
    cu_seqlens = torch.tensor([0, 1, 640, 640, 5001, 9000], device="cuda")
    options = dict(num_columns=columns, partition=partition, cu_seqlens=cu_seqlens)
    check(make(1, 9000, 2, 128, torch.bfloat16), torch.bfloat16, **options)


@every_state
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [1, 7, 40])
def test_error_of_the_state_after_a_call(dtype, columns, partition):
    harder = SMALL_BLOCKS if columns == 40 and partition in SMALL_BLOCK_PARTITIONS else None
    options = dict(num_columns=columns, partition=partition, final=True)
    check(make(2, 1111, 2, 64, dtype), dtype, harder=harder, **options)


@every_state
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "columns"), [(389, 7), (20000, 7), (20000, 40)])
def test_error_after_a_state(dtype, tokens, columns, partition):
    state = state_at(tokens, columns, partition, G=2, K=64, device="cuda")
    options = dict(num_columns=columns, partition=partition, initial_state=state, final=True)
    check(make(2, 700, 2, 64, dtype), dtype, **options)


@every_state
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [2, 7, 40])
@pytest.mark.parametrize(("first", "position"), [(20000, 20000), (389, 389), (19000, 20000), (12345, 12400)])
def test_error_of_sequences_that_began_at_a_position(dtype, columns, partition, first, position):
    """Their scores are as exact as those of sequences that began at 0."""
    state = state_at(position, columns, partition, first=first, G=2, K=64, device="cuda")
    options = dict(num_columns=columns, partition=partition, initial_state=state, final=True)
    check(make(2, 700, 2, 64, dtype), dtype, **options)


@every_state
@pytest.mark.parametrize("columns", [2, 7, 40])
def test_sequences_from_starts_of_their_own_are_the_definition(columns, partition):
    starts, T = [0, 37, 4000, 20003], 300
    inputs = {name: x.detach() for name, x in make(4, T, 2, 64, torch.float32).items()}
    sizes = dict(num_columns=columns, groups=2, key_dim=64, device="cuda")
    state = zero_sums(4, position=torch.tensor(starts, device="cuda"), partition=partition, **sizes)
    options = dict(num_columns=columns, partition=partition, initial_state=state, impl="triton")
    found = bucket_scores(**inputs, **options)
    for row, start in enumerate(starts):
        units = [unit_length(x[row].double()).transpose(0, 1) for x in inputs.values()]
        exact = dense_bucket_scores(*units, columns, partition, start).transpose(0, 1)
        assert relative_error(found.scores[row], exact) < THREE_TF32
        assert torch.equal(found.tokens[row].cpu(), dense_tokens_TL(T, columns, partition, start))


@every_state
def test_a_start_at_0_changes_no_bit(partition):
    """The kernels give the same without the positions of first tokens."""
    runs = kernel_runs(partition, 20000, device="cuda")
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_call_compiles_as_one_graph_and_never_waits():
    inputs = make(1, 2000, 2, 64, torch.bfloat16)
    options = dict(num_columns=12, partition=Partition(4, 16), output_final_state=True)

    def operator(q, k):
        return bucket_scores(q, k, **options)

    def run(function):
        out = function(**inputs)
        more = bucket_scores(**inputs, initial_state=out.final_state, **options)
        return [out.scores, *torch.autograd.grad(more.scores.sum() + out.scores.sin().sum(), list(inputs.values()))]

    expected = run(operator)
    with waiting_is_an_error():
        run(operator)
    compiled = run(torch.compile(operator, fullgraph=True))
    for a, b in zip(compiled, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_two_runs_give_the_same_bits():
    inputs = make(2, 3000, 3, 128, torch.bfloat16)

    def run():
        poison()
        scores = bucket_scores(**inputs, num_columns=20, partition=Partition(8, 64), impl="triton").scores
        return [scores, *torch.autograd.grad(scores.square().sum(), list(inputs.values()))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_auto_takes_the_kernels_and_says_why_not():
    from loglinear.ops.announcement import announced

    inputs = make(1, 100, 1, 16, torch.bfloat16)
    with announced() as lines:
        bucket_scores(**inputs, num_columns=5, partition=Partition(4, 16))
        bucket_scores(**inputs, num_columns=5, partition=Partition(4, 1, 64))
    assert lines[1] == "bucket_scores runs with impl='triton'"
    assert lines[0].startswith(
        "bucket_scores runs with impl='torch': Partition(radix=4, finest_block=1, largest_block=64)"
    )

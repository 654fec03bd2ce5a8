"""The kernel of the scores' step with every partition, on a GPU, against float64."""

import pytest
import torch

from loglinear.ops import DecodeState, bucket_scores, bucket_scores_step, bucket_tokens
from loglinear.ops.announcement import announced
from loglinear.ops.scores import zero_sums
from loglinear.partition import Partition
from tests.kernels.score_steps import CASES, full_sums, many_carries, queries_and_keys, scores_error, step_error
from tests.kernels.stepping import blocks_error, decoding
from tests.waiting import waiting_is_an_error

pytestmark = pytest.mark.gpu
FLOAT32 = 3e-5  # of a score (`scores_error`) or of a sum; three tf32 products are below 1e-6
LATE = 1 << 32  # chunks
LONG = [(Partition(4, 16), 25), (Partition(16, 64), 40), (Partition(4, 64, 4096), 25)]


def check_steps(state, columns, dtype=torch.float32, steps=3):
    """Scores and sums against impl="torch" in float64 with the same rounded tokens; two runs give the same bits."""
    tokens = [(q.to(dtype), k.to(dtype)) for q, k in queries_and_keys(state, steps)]
    runs = []
    for _ in range(2):
        exact, actual = decoding(state), decoding(state, torch.float32)
        assert max(step_error(exact, actual, token, columns) for token in tokens) < FLOAT32
        runs.append(actual.fenwick.tensors)
    found = [
        [bucket_scores_step(*token, one, num_columns=columns, impl="triton")[0] for token in tokens]
        for one in (decoding(state, torch.float32), decoding(state, torch.float32))
    ]
    for a, b in (runs, found):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("partition, columns", CASES, ids=str)
def test_steps_over_carries(partition, columns):
    positions = [*many_carries(partition), partition.finest_block * (LATE + partition.radix) - 1]
    check_steps(full_sums(partition, positions, columns, "cuda", groups=2, key_dim=64), columns)


@pytest.mark.parametrize("partition, columns", CASES, ids=str)
def test_rows_that_began_at_positions_of_their_own(partition, columns):
    """Each row inside of a bucket, at its end, or with the last token."""
    f = partition.finest_block
    positions = [*many_carries(partition), f * (LATE + partition.radix) - 1]
    middle = [p * i // len(positions) for i, p in enumerate(positions)]
    for first in (middle, [max(0, p - f) for p in positions], positions):
        check_steps(full_sums(partition, positions, columns, "cuda", first=first, groups=2, key_dim=64), columns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [(1, 128), (6, 192), (1, 5), (2, 80), (3, 256), (300, 64)], ids=str)
@pytest.mark.parametrize("partition, columns", [(Partition(4, 16), 20), (Partition(16, 64, 1024), 40)], ids=str)
def test_steps_of_every_width(partition, columns, heads, dtype):
    """One program for each row and group, or up to 16, of which the last adds the parts."""
    G, K = heads
    C = partition.finest_block
    positions = [C * partition.radix**2 - 1] if G == 300 else many_carries(partition)
    check_steps(full_sums(partition, positions, columns, "cuda", groups=G, key_dim=K), columns, dtype)


@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("partition, columns", [(Partition(4, 16), 20), (Partition(16, 64), 40)], ids=str)
def test_steps_of_many_rows(partition, columns, K):
    positions = [partition.finest_block * n - 1 for n in range(1, 81)]
    check_steps(full_sums(partition, positions, columns, "cuda", groups=4, key_dim=K), columns)


def test_a_thousand_steps_of_one_row():
    """The last program adds parts that others have just written, again and again."""
    partition, columns = Partition(4, 16), 20
    state = full_sums(partition, [16 * 60], columns, "cuda", key_dim=128)
    check_steps(state, columns, steps=1000)


def test_rows_that_are_not_active_keep_their_state():
    partition, columns = Partition(4, 16), 8
    state = full_sums(partition, [16 * 16 - 1] * 3, columns, "cuda", key_dim=64)
    exact, actual = decoding(state), decoding(state, torch.float32)
    before = [x.clone() for x in actual.fenwick.tensors]
    for mask in ([True, False, False], [True, True, False]):
        active, (q, k) = torch.tensor(mask, device="cuda"), queries_and_keys(state, 1)[0]
        q[~active] = k[~active] = torch.nan
        assert step_error(exact, actual, (q, k), columns, active=active) < FLOAT32
    assert all(torch.equal(x[2], old[2]) for x, old in zip(actual.fenwick.tensors, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("partition, columns", LONG, ids=str)
@torch.no_grad()
def test_seventy_thousand_steps(partition, columns, dtype):
    """In a graph that waits for nothing: every step against whole sequences in float64, and the sums at the end.

    Rows start at positions of their own, and their own tokens alone count."""
    starts, steps, G, K = [0, 37, 1000], 70_000, 2, 64
    sizes = dict(num_columns=columns, groups=G, key_dim=K, partition=partition, device="cuda")
    start = zero_sums(3, position=torch.tensor(starts), **sizes)
    inputs = torch.randn(2, 3, steps, G, K, device="cuda").to(dtype)
    state, (q, k) = DecodeState.of(start), inputs[:, :, 0].clone()
    bucket_scores_step(q, k, state, num_columns=columns, impl="triton")  # compiles
    state.copy_(start)
    graph = torch.cuda.CUDAGraph()
    with waiting_is_an_error(), torch.cuda.graph(graph):
        scores, tokens = bucket_scores_step(q, k, state, num_columns=columns, impl="triton")
    found = torch.empty(3, steps, G, columns, device="cuda")
    counts = torch.empty(3, steps, columns, dtype=torch.int64, device="cuda")
    for t in range(steps):
        q.copy_(inputs[0, :, t])
        k.copy_(inputs[1, :, t])
        graph.replay()
        found[:, t], counts[:, t] = scores, tokens
    assert state.fenwick.position.tolist() == [n + steps for n in starts]

    empty = zero_sums(3, position=torch.tensor(starts), dtype=torch.float64, **sizes)
    options = dict(num_columns=columns, partition=partition, output_final_state=True, impl="torch")
    whole = bucket_scores(*inputs.double(), initial_state=empty, **options)
    first = torch.tensor(starts, device="cuda")[:, None]
    position = first + torch.arange(steps, device="cuda")
    assert torch.equal(counts, bucket_tokens(position, num_columns=columns, partition=partition, first=first))
    for row in range(3):
        error = scores_error(found[row], whole.scores[row], counts[row], K)
        print(f"{partition} {dtype} from {starts[row]}: {error:.1e}")
        assert error < FLOAT32
    assert blocks_error(state, DecodeState.of(whole.final_state)) < FLOAT32


def test_auto_takes_the_kernel():
    state = full_sums(Partition(4, 1, 64), [5], 9, "cuda")
    q, k = queries_and_keys(state, 1)[0]
    with announced() as lines:
        bucket_scores_step(q.float(), k.float(), decoding(state, torch.float32), num_columns=9)
    assert lines == ["bucket_scores_step runs with impl='triton'"]

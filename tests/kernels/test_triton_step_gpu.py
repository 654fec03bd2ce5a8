"""The one-token kernels with every partition, on a GPU, against float64."""

import pytest
import torch

from loglinear.ops import DecodeState, FenwickState
from loglinear.partition import FENWICK, Partition
from tests.kernels.stepping import blocks_error, decoding, full_state, sparse_tokens, step_of, tokens_for
from tests.ops.operators import relative_error
from tests.waiting import waiting_is_an_error

pytestmark = pytest.mark.gpu
FLOAT32 = 3e-5  # of a row's output or of a block; three tf32 products are below 1e-6
# A mistake is larger than these limits of one token's output: its own rounding, and less than one for float32.
OUTPUT = {torch.float32: FLOAT32, torch.bfloat16: 5e-3, torch.float16: 1e-3}

# With the tokens of a chunk and the columns of about 70,000 tokens, or few of them.
CASES = [
    (FENWICK, 64, 18),
    (Partition(2, 16), 64, 14),
    (Partition(4), 64, 27),
    (Partition(4, 64), 64, 9),
    (Partition(8), 64, 38),
    (Partition(16, 64), 64, 40),
    (Partition(16, 16), 16, 50),
    (Partition(32), 32, 70),
    (Partition(64, 16), 16, 20),
    (Partition(4, 128), 128, 12),
    (Partition(16, 64, 1024), 64, 80),
    (Partition(4, 16, 64), 16, 11),
]
LONG = [(Partition(4), 27), (Partition(16, 64), 40), (Partition(4, 64, 4096), 25)]


def carries(partition, C):
    """Positions before no carry, before carries of one, two and three digits, inside of a chunk, and very late."""
    r = partition.radix
    chunks = [1, r, r**2, r**3, r**2 + r + 3, 3 * r, (1 << 32) + r]
    return [C * n - 1 for n in chunks] + [3, C * (r**3 - 1) + C // 2 + 1]


@pytest.mark.parametrize("partition, C, columns", CASES, ids=str)
def test_steps_over_carries(operator, partition, C, columns):
    dims = dict(groups=2, heads=4, key_dim=64, value_dim=80)
    state = full_state(operator, partition, carries(partition, C), columns, C, "cuda", **dims)
    check_steps(operator, state, columns, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(1, 6, 128, 64), (2, 2, 192, 384), (1, 2, 5, 3), (2, 2, 256, 256)], ids=str)
@pytest.mark.parametrize("partition, columns", [(Partition(4), 20), (Partition(16, 64, 1024), 40)], ids=str)
def test_steps_of_every_width(operator, partition, columns, heads, dtype):
    if heads[3] > 256 and not operator.delta:
        heads = (2, 2, 192, 256)  # the widest values of the scalar gate
    dims = dict(zip(("groups", "heads", "key_dim", "value_dim"), heads, strict=True))
    state = full_state(operator, partition, carries(partition, 64), columns, 64, "cuda", **dims)
    check_steps(operator, state, columns, dtype)


@pytest.mark.parametrize("partition, C, columns", [(Partition(4), 64, 20), (Partition(16, 64), 64, 40)], ids=str)
def test_steps_of_many_rows(operator, partition, C, columns):
    """So many that a program has a tile of 64 columns."""
    positions = [C * n - 1 for n in range(1, 81)]
    dims = dict(groups=4, heads=4, key_dim=128, value_dim=128)
    state = full_state(operator, partition, positions, columns, C, "cuda", **dims)
    check_steps(operator, state, columns, torch.float32)


@pytest.mark.parametrize("partition, C, columns", CASES, ids=str)
def test_blocks_whose_lambda_is_0_are_not_read(operator, partition, C, columns):
    r = partition.radix
    positions = [C * r**2 + 3, C * (r + 1), C * (r**3 - 1) + C // 2]
    dims = dict(groups=2, heads=4, key_dim=64, value_dim=80)
    state = full_state(operator, partition, positions, columns, C, "cuda", **dims)
    token, poisoned, exact = sparse_tokens(operator, state, columns)
    expected = step_of(operator)(*token.values(), decoding(exact), impl="torch")
    token = [x.float() for x in token.values()]
    found = step_of(operator)(*token, decoding(poisoned, torch.float32), impl="triton", sparse=True)
    assert max(relative_error(y, e) for y, e in zip(found, expected, strict=True)) < FLOAT32


def check_steps(operator, state, columns, dtype):
    """Three steps: outputs and blocks against impl="torch" in float64 with the same rounded tokens; two runs."""
    runs = []
    tokens = [[x.to(dtype) for x in token.values()] for token in tokens_for(operator, state, 3, columns)]
    exact = decoding(state)
    expected = [step_of(operator)(*(x.double() for x in token), exact, impl="torch") for token in tokens]
    for _ in range(2):
        actual = decoding(state, torch.float32)
        runs.append([*(step_of(operator)(*token, actual, impl="triton") for token in tokens), *actual.fenwick.tensors])
    for output, right in zip(runs[0], expected, strict=False):
        assert output.dtype == dtype
        assert max(relative_error(y, e) for y, e in zip(output, right, strict=True)) < OUTPUT[dtype]
    assert blocks_error(actual, exact) < FLOAT32
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("partition, columns", LONG, ids=str)
@torch.no_grad()
def test_seventy_thousand_steps(operator, partition, columns, dtype):
    """In a graph that waits for nothing: every step against the whole sequences in float64, and the blocks at the end.

    Rows start at positions of their own, as after tokens that wrote nothing."""
    starts, steps, H, K, V = [0, 37, 1000], 70_000, 2, 64, 64
    sizes = dict(
        num_levels=columns, chunk_size=64, groups=1, heads=H, key_dim=K, value_dim=V, delta_rule=operator.delta
    )
    start = dict(position=torch.tensor(starts), partition=partition, device="cuda")
    inputs = operator.inputs(B=3, T=steps, G=1, H=H, K=K, V=V, L=columns, decay=0.01)
    inputs = {name: x.detach().to("cuda", dtype) for name, x in inputs.items()}
    state = DecodeState.zeros(3, **sizes, **start)
    token = [x[:, 0].clone() for x in inputs.values()]
    step_of(operator)(*token, state, impl="triton")  # compiles
    state.copy_(FenwickState.zeros(3, **sizes, **start))
    graph = torch.cuda.CUDAGraph()
    with waiting_is_an_error(), torch.cuda.graph(graph):
        out = step_of(operator)(*token, state, impl="triton")
    outputs = torch.empty(3, steps, H, V, dtype=dtype, device="cuda")
    for t in range(steps):
        for held, x in zip(token, inputs.values(), strict=True):
            held.copy_(x[:, t])
        graph.replay()
        outputs[:, t] = out
    assert state.fenwick.position.tolist() == [n + steps for n in starts]

    empty = FenwickState.zeros(3, dtype=torch.float64, **sizes, **start)
    for row, n in enumerate(starts):
        one = {name: x[row : row + 1].double() for name, x in inputs.items()}
        first = empty.index_select(torch.tensor([row], device="cuda"))
        options = dict(partition=partition, chunk_size=64, output_final_state=True, impl="torch")
        whole = operator(one, initial_state=first, **options)
        exact = whole.output[0].flatten(1)
        errors = (outputs[row].flatten(1).double() - exact).norm(dim=1) / exact.norm(dim=1)
        print(
            f"{operator.name} {partition} {dtype} from {n}: {float(errors.max()):.1e}, mean {float(errors.mean()):.1e}"
        )
        assert float(errors.max()) < OUTPUT[dtype], (n, int(errors.argmax()))
        assert relative_error(state.fenwick.blocks[row], whole.final_state.blocks[0]) < FLOAT32

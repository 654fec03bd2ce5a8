"""The Triton kernels with other partitions than radix 2, on a GPU: every family against float64, with all gradients."""

import pytest
import torch

from loglinear.partition import Partition
from tests.kernels.emulated import EMULATED, STATES
from tests.kernels.emulation import make
from tests.kernels.test_triton_gpu import DELTA, check
from tests.ops.operators import OPERATORS
from tests.waiting import waiting_is_an_error

pytestmark = pytest.mark.gpu

# Chunks of 64, 16 and 128; the largest one is in halves.
PARTITIONS = [
    Partition(4, 16),
    Partition(4),
    Partition(16, 16),
    Partition(16, 64),
    Partition(2, 16),
    Partition(4, 128),
    Partition(64, 16),
]
# Errors of the delta rule in bfloat16, as in `emulation`: chunks of 16 tokens are multiplied as float16's are; and of
# the few raw tokens of a state, the largest of STATES and of these partitions (5 and 32 tokens, two seeds, T = 350).
SMALL_CHUNKS = EMULATED["delta_rule"][torch.float16]
RAW_TOKENS = {"gradient of state's log_decay": 3.87e-3, "gradient of state's beta": 1.67e-2}
every_partition = pytest.mark.parametrize("partition", PARTITIONS, ids=str)


def check_case(delta, T, columns, partition, **options):
    """One sequence of T tokens, or several that are packed."""
    inputs = make(1, T, 1, 2, 128, 64, columns, torch.bfloat16, delta=delta)
    is_small = delta and partition.chunk_near(64, most=64) == 16
    check(inputs, torch.bfloat16, emulated=SMALL_CHUNKS if is_small else None, partition=partition, **options)


@DELTA
@every_partition
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [(1, 4, 128, 64), (2, 4, 64, 64), (1, 2, 80, 48)], ids=str)
def test_error_of_every_partition(delta, heads, dtype, partition):
    if partition.finest_block > 64 and dtype != torch.bfloat16:
        partition = Partition(partition.radix, 64)  # the largest chunk of these products
    G, H, K, V = heads
    check(make(2, 1111, G, H, K, V, 20, dtype, delta=delta), dtype, scale=0.7, partition=partition)


@DELTA
@every_partition
@pytest.mark.parametrize("columns", [1, 3, 9, 20, 60])
@pytest.mark.parametrize("T", [1, 127, 4097, 16384])
def test_error_of_every_partition_at_every_length(delta, T, columns, partition):
    check_case(delta, T, columns, partition)


@DELTA
@every_partition
@pytest.mark.parametrize("columns", [7, 40])
@pytest.mark.parametrize("tokens", [389, 20000])
def test_error_of_every_partition_after_a_state(delta, tokens, columns, partition):
    """With the final state; the initial one has many blocks, or few of them that are a prefix."""
    options = dict(partition=partition, chunk_size=partition.chunk_near(64, most=64))
    first = make(2, tokens, 1, 2, 64, 64, columns, torch.bfloat16, seed=1, delta=delta)
    state = OPERATORS[delta](first, impl="triton", output_final_state=True, **options).final_state
    inputs = make(2, 700, 1, 2, 64, 64, columns, torch.bfloat16, delta=delta)
    emulated = STATES[options["chunk_size"]] | RAW_TOKENS if delta else None
    check(inputs, torch.bfloat16, emulated=emulated, initial_state=state, final=True, **options)


@DELTA
@every_partition
@pytest.mark.parametrize("columns", [5, 40])
def test_packed_sequences_of_every_partition(delta, columns, partition):
    cu_seqlens = torch.tensor([0, 1, 640, 640, 5001, 9000], device="cuda")
    check_case(delta, 9000, columns, partition, cu_seqlens=cu_seqlens)


@DELTA
def test_a_partition_compiles_as_one_graph_and_never_waits(delta):
    inputs = make(1, 2000, 1, 2, 64, 64, 12, torch.bfloat16, delta=delta)
    family, options = OPERATORS[delta], dict(impl="triton", partition=Partition(4, 16), output_final_state=True)

    def run(function):
        out = function(inputs)
        more = family(inputs, initial_state=out.final_state, **options)
        return [out.output, *torch.autograd.grad(more.output.sum(), list(inputs.values()))]

    def operator(x):
        return family(x, **options)

    expected = run(operator)
    with waiting_is_an_error():
        run(operator)
    compiled = run(torch.compile(operator, fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected, strict=True))

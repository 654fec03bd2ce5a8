"""The Triton kernels with other partitions than radix 2, under the interpreter: against float64, with all gradients."""

import importlib

import pytest
import torch
from torch._subclasses import FakeTensorMode

from loglinear.kernels.torch import has_blocks
from loglinear.ops import FenwickState
from loglinear.partition import FENWICK, Partition
from tests.kernels.emulated import EMULATED
from tests.kernels.emulation import errors, excesses, make, teach_rounding
from tests.kernels.interpreter import teach_interpreter
from tests.kernels.test_triton import FACTOR, compare
from tests.ops.operators import OPERATORS, relative_error

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

# Finest blocks of one token, of some and of a chunk of 16, 32 or 64.
PARTITIONS = [
    Partition(2, 16),
    Partition(4),
    Partition(4, 16),
    Partition(8, 2),
    Partition(16, 16),
    Partition(32),
    Partition(64, 16),
]
BACKWARDS = ("scalar_gate.backward", "delta_rule.backward")
every_partition = pytest.mark.parametrize("partition", PARTITIONS, ids=str)
few_partitions = pytest.mark.parametrize("partition", [Partition(4, 4), Partition(16, 16)], ids=str)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    teach_interpreter(monkeypatch.setattr)


def state_at(operator, partition, position, columns, **sizes):
    """A state of `position` tokens, detached."""
    sizes = dict(G=1, H=1, K=8, V=8) | sizes
    chunk_size = partition.chunk_near(16, most=64)
    inputs = operator.inputs(B=1, T=position, L=columns, **sizes)
    options = dict(partition=partition, chunk_size=chunk_size, output_final_state=True)
    return operator(inputs, **options).final_state.detach()


@every_partition
@pytest.mark.parametrize("T", [17, 150])
def test_any_length_and_number_of_columns(operator, partition, T):
    """All columns, fewer of them so that blocks of one size share the last one, and a chunk's alone."""
    most = partition.num_columns(T)
    for columns in {1, max(1, most // 2), most + 2}:
        inputs = operator.inputs(B=1, T=T, G=1, H=1, K=8, V=8, L=columns)
        compare(inputs, partition=partition, chunk_size=64, final=False)


@every_partition
@pytest.mark.parametrize("columns", [4, 40], ids=str)
def test_packed_sequences(operator, partition, columns):
    cu_seqlens = torch.tensor([0, 1, 40, 40, 72, 200])
    inputs = operator.inputs(B=1, T=200, G=1, H=1, K=8, V=8, L=columns)
    compare(inputs, partition=partition, cu_seqlens=cu_seqlens)


@every_partition
@pytest.mark.parametrize(("start", "columns"), [(37, 5), (16 * 21 + 5, 20), (16 * 70, 8), (16 * 70, 70)])
def test_continues_a_state(operator, partition, start, columns):
    """The state's prefix ends at several heights, and among blocks of its own size."""
    state = state_at(operator, partition, start, columns)
    inputs = operator.inputs(B=1, T=100, G=1, H=1, K=8, V=8, L=columns)
    compare(inputs, partition=partition, initial_state=state)


@few_partitions
def test_continues_packed_states_at_different_positions(operator, partition):
    states = [state_at(operator, partition, length, 9, H=2) for length in (1, 30, 16 * 19)]
    tensors = (torch.cat(x) if isinstance(x[0], torch.Tensor) else x[0] for x in zip(*states, strict=True))
    cu_seqlens = torch.tensor([0, 50, 50, 90])
    inputs = operator.inputs(B=1, T=90, G=1, H=2, K=8, V=8, L=9)
    compare(inputs, partition=partition, initial_state=FenwickState(*tensors), cu_seqlens=cu_seqlens)


@few_partitions
@pytest.mark.parametrize("ends", [[0, 0, 20], [0, 20, 20]], ids=str)
def test_a_continued_sequence_without_new_tokens(operator, partition, ends):
    states = [state_at(operator, partition, 16 * chunks, 8, K=4, V=4) for chunks in (65, 3)]
    tensors = (torch.cat(x) if isinstance(x[0], torch.Tensor) else x[0] for x in zip(*states, strict=True))
    inputs = operator.inputs(B=1, T=20, G=1, H=1, K=4, V=4, L=8)
    compare(inputs, partition=partition, initial_state=FenwickState(*tensors), cu_seqlens=torch.tensor(ends))


@few_partitions
@pytest.mark.parametrize("columns", [8, 50])
def test_readers_in_runs(operator, partition, columns):
    """More than 64 chunks, with radix 16 more than 16. The delta rule has three tiers, or two."""
    most = 35 if partition.radix == 16 else 21 if operator.delta else 67
    T = 16 * most + 3
    compare(operator.inputs(B=1, T=T, G=1, H=1, K=4, V=4, L=columns), partition=partition)


@pytest.mark.parametrize(
    "partition", [Partition(2, 16), Partition(2, 64), Partition(2, 128), Partition(4, 128)], ids=str
)
@pytest.mark.parametrize("columns", [2, 4, 12])
def test_chunks_of_128(operator, partition, columns):
    """One column between the halves of a chunk, which may be that of the halves' own reads."""
    inputs = make(1, 300, 1, 2, 16, 16, columns, torch.float32, device="cpu", delta=operator.delta)
    found = excesses(inputs, 128, partition=partition)
    assert all(times <= FACTOR for times in found.values()), found


@few_partitions
def test_groups_and_wide_heads(operator, partition):
    compare(operator.inputs(B=1, T=70, G=2, H=4, K=24, V=72, L=8), partition=partition, scale=0.7)


@pytest.mark.parametrize("partition", [Partition(2, 4), Partition(4), Partition(16, 16)], ids=str)
def test_lambda_of_columns_that_a_token_does_not_read_does_not_matter(operator, partition):
    inputs = make(1, 200, 1, 1, 8, 8, 20, torch.float32, device="cpu", delta=operator.delta)
    clean = {n: x.detach().clone().requires_grad_() for n, x in inputs.items()}
    reads = torch.zeros(200, 20, dtype=torch.bool)
    for t in range(200):
        reads[t, [min(partition.index(t, s), 19) for s in range(t + 1)]] = True
    with torch.no_grad():
        inputs["level_scales"][0, ~reads[:, None]] = torch.nan
    found = excesses(inputs, partition.chunk_near(64, most=64), clean, partition)
    assert all(times <= FACTOR for times in found.values()), found


@few_partitions
def test_what_was_not_written_is_not_read(operator, partition, monkeypatch):
    def poisoned(empty):
        def full_of_nan(*args, **kwargs):
            x = empty(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return full_of_nan

    inputs = make(1, 245, 1, 1, 8, 8, 30, torch.float32, device="cpu", delta=operator.delta)
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    found = excesses(inputs, 16, partition=partition)
    assert all(times <= FACTOR for times in found.values()), found


@pytest.mark.parametrize("partition", [Partition(4, 32), Partition(16, 32)], ids=str)
def test_bfloat16_products(operator, partition, monkeypatch):
    """The branches for bfloat16, at about the errors that its rounding makes with radix 2."""
    teach_rounding(monkeypatch.setattr)
    inputs = make(1, 600, 1, 2, 64, 64, 9, torch.bfloat16, device="cpu", float32_scales=True, delta=operator.delta)
    found = errors(inputs, 32, partition=partition)
    assert all(found[name] <= 1.1 * limit for name, limit in EMULATED[operator.name][torch.bfloat16].items()), found


@pytest.mark.parametrize("partition", [FENWICK, Partition(16, 16)], ids=str)
def test_chunks_of_16_tokens_round_as_float16_does(partition, monkeypatch):
    """The delta rule moves a state from chunk to chunk, and there are many chunks."""
    teach_rounding(monkeypatch.setattr)
    inputs = make(1, 300, 1, 2, 64, 64, 9, torch.bfloat16, device="cpu", delta=True)
    found = errors(inputs, 16, partition=partition)
    assert all(found[name] <= limit for name, limit in EMULATED["delta_rule"][torch.float16].items()), found


@pytest.mark.parametrize("chunk_size", [16, 32])
def test_traced_results_in_bfloat16_have_the_dtypes_of_real_ones(chunk_size, monkeypatch):
    """The arrays saved for the backward are float32 in chunks of 16 tokens, bfloat16 in larger ones."""
    from loglinear.kernels.triton import chunkwise

    teach_rounding(monkeypatch.setattr)
    x = make(1, 40, 1, 1, 40, 40, 4, torch.bfloat16, device="cpu", delta=True)
    options = (None, None, None, 1.0, chunk_size, True, FENWICK.numbers)
    tensors = [x[name].detach() for name in OPERATORS[1].names]
    real = chunkwise(*tensors, *options)
    traced = chunkwise(*map(FakeTensorMode().from_tensor, tensors), *options)
    assert [(y.dtype, y.shape) for y in traced] == [(y.dtype, y.shape) for y in real]
    assert real[2].dtype == (torch.float32 if chunk_size == 16 else torch.bfloat16)


@few_partitions
def test_two_runs_give_the_same_bits(operator, partition):
    inputs = operator.inputs(B=1, T=70, G=1, H=2, K=8, V=8, L=8, dtype=torch.float32)

    def run():
        out = operator(inputs, impl="triton", partition=partition).output
        return [out, *torch.autograd.grad(out.square().sum(), list(inputs.values()))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@few_partitions
def test_is_one_node_for_torch(operator, partition):
    from loglinear.kernels.triton import chunkwise

    x = operator.inputs(B=1, T=20, G=1, H=1, K=8, V=8, L=6, dtype=torch.float32)
    tensors = [x.get(name) for name in OPERATORS[1].names]
    torch.library.opcheck(chunkwise, (*tensors, None, None, None, 1.0, 16, True, partition.numbers))

    def call(x):
        return operator(x, impl="triton", partition=partition, chunk_size=16, output_final_state=True)

    output, state = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    assert state.partition == partition
    assert torch.equal(output, call(x).output) and torch.equal(state.blocks, call(x).final_state.blocks)


@few_partitions
def test_second_derivatives(operator, partition):
    """They are those of impl="torch"."""
    inputs = operator.inputs(B=1, T=40, G=1, H=1, K=4, V=4, L=8, dtype=torch.float32)
    found = []
    for impl in ("triton", "torch"):
        output = operator(inputs, impl=impl, partition=partition, chunk_size=16).output
        first = torch.autograd.grad(output.square().sum(), list(inputs.values()), create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in first), list(inputs.values())))
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) < 1e-4


def test_a_state_is_that_of_the_other_implementation(operator):
    """Both leave the same blocks at the same places, and none where the past has none."""
    for partition in PARTITIONS:
        inputs = operator.inputs(B=1, T=150, G=1, H=1, K=4, V=4, L=9, dtype=torch.float32)
        options = dict(partition=partition, chunk_size=16, output_final_state=True)
        triton, torch_ = (operator(inputs, impl=impl, **options).final_state for impl in ("triton", "torch"))
        torch.testing.assert_close(triton.blocks, torch_.blocks)
        chunk_size = triton.chunk_size
        is_there = has_blocks(triton.position // chunk_size, triton.blocks.shape[1], chunk_size, partition)
        assert torch.equal((triton.blocks != 0).any(-1).any(-1).any(-1), is_there)


@pytest.mark.parametrize(
    "partition, text",
    [
        (Partition(128), "takes a radix up to 64 without a largest block"),
        (Partition(4, 1, 64), "takes a radix up to 64 without a largest block"),
        (Partition(4, 8), "with chunks of 8 needs impl='torch': impl='triton' takes 16 to 64 here"),
        (Partition(2, 256), "with chunks of 256 needs impl='torch': impl='triton' takes 16 to 64 here"),
    ],
    ids=str,
)
def test_says_which_partitions_it_does_not_take(operator, partition, text):
    inputs = operator.inputs(B=1, T=5, G=1, H=1, K=8, V=8, L=3, dtype=torch.float32)
    with pytest.raises(ValueError, match=text):
        operator(inputs, impl="triton", partition=partition, chunk_size=8)


def test_radix_2_is_the_default(operator):
    inputs = operator.inputs(B=1, T=70, G=1, H=1, K=8, V=8, L=8, dtype=torch.float32)
    outputs = [operator(inputs, impl="triton", **x).output for x in ({}, dict(partition=FENWICK))]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("lengths", [None, [40, 0, 110]], ids=str)
def test_slabs_of_heads_give_the_same_bits(operator, lengths, monkeypatch):
    """A large radix keeps many states a chunk, so both directions may take some heads after the others."""
    from loglinear.kernels.triton.inputs import Results

    inputs = operator.inputs(B=1, T=150, G=2, H=4, K=16, V=16, L=20)
    inputs = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    options = dict(partition=Partition(16, 16), impl="triton", output_final_state=True, chunk_size=16)
    parts = []
    monkeypatch.setattr(Results, "joined", _counting(Results.joined, parts))

    def run():
        out = operator(inputs, cu_seqlens=cu_seqlens, **options)
        loss = out.output.sin().sum() + out.final_state.blocks.cos().sum()
        return [out.output, out.final_state.blocks, *torch.autograd.grad(loss, list(inputs.values()))]

    together = run()
    for module, name in (("delta_rule.forward", "PAST_BYTES"), *((x, "SLAB_BYTES") for x in BACKWARDS)):
        monkeypatch.setattr(importlib.import_module(f"loglinear.kernels.triton.{module}"), name, 1)
    apart = run()
    assert parts == [1, 4 if operator.delta else 1]
    for x, y in zip(together, apart, strict=True):
        assert relative_error(y, x.double()) < 1e-6


def _counting(joined, counts):
    def count(parts):
        counts.append(len(parts))
        return joined(parts)

    return staticmethod(count)

"""Every partition of the past: the operators equal the definitions, in float64 and with every gradient."""

import re

import pytest
import torch

from loglinear.ops import DecodeState, FenwickState, log_linear_attention_step, log_linear_delta_rule_step
from loglinear.partition import FENWICK, Partition
from tests.ops.operators import (
    OPERATORS,
    SCALAR_GATES,
    check_pieces,
    excess,
    gradients,
    parametrize,
    parts,
    random_loss,
    relative_error,
)

EXACT = 1e-12
FLOAT32_FACTOR = 4  # times the error of the float32 recurrence
RADIX_4 = Partition(4, 4)

every_operator = parametrize(OPERATORS)

# chunks of one or more blocks, blocks that grow without limit, and old blocks that stay apart
PARTITIONS = [
    Partition(2, 4),
    Partition(4),
    Partition(4, 4),
    Partition(8, 1),
    Partition(16, 1),
    Partition(16, 16),
    Partition(2, 1, 8),
    Partition(4, 4, 16),
    Partition(8, 4, 4),
    Partition(16, 1, 16),
]
every_partition = pytest.mark.parametrize("partition", PARTITIONS, ids=str)


def columns(partition, T):
    """All columns, fewer ones so that several blocks of one size share the last, one, and more than there are."""
    most = partition.num_columns(T)
    return sorted({1, 2, max(1, most - 1), max(1, most // 2), most, most + 3})


def check_equal(inputs, actual, expected):
    assert relative_error(actual, expected) < EXACT
    weights = random_loss(expected)
    grads = [gradients([y], weights, list(inputs.values())) for y in (actual, expected)]
    for name, a, e in zip(inputs, *grads, strict=True):
        assert relative_error(a, e) < 10 * EXACT or float((a - e).norm()) < EXACT, name


@every_operator
@every_partition
@pytest.mark.parametrize("T", [1, 2, 3, 17, 63, 65, 130])
def test_both_implementations_match_dense_with_every_gradient(operator, partition, T):
    for L in columns(partition, T) if T in (17, 65) else columns(partition, T)[-3:-1]:
        inputs = operator.inputs(B=1, T=T, L=L, K=3, V=2)
        for impl in ("torch", "reference") if T < 63 else ("torch",):
            actual = operator(inputs, partition=partition, chunk_size=4, impl=impl).output
            check_equal(inputs, actual, operator.dense(inputs, partition))


@every_operator
@pytest.mark.parametrize("chunk_size", [1, 8, 64, 256])
@pytest.mark.parametrize("partition", [Partition(4), Partition(16, 4), Partition(16, 64), Partition(8, 8, 64)], ids=str)
def test_the_chunk_changes_no_result(operator, partition, chunk_size):
    inputs = operator.inputs(T=257, L=partition.num_columns(257) - 1, B=1, H=2)
    actual = operator(inputs, partition=partition, chunk_size=chunk_size).output
    check_equal(inputs, actual, operator.dense(inputs, partition))


@every_operator
def test_radix_2_is_the_default(operator):
    inputs = operator.inputs(T=45)
    leaves, weights, runs = list(inputs.values()), None, []
    for options in ({}, dict(partition=Partition(radix=2)), dict(partition=Partition(2, 1, 64))):
        result = operator(inputs, chunk_size=4, **options)
        weights = weights or random_loss(result.output)
        runs.append([result.output, *gradients([result.output], weights, leaves)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@every_operator
@every_partition
def test_lambda_of_one_is_the_linear_model(operator, partition):
    inputs = operator.inputs(T=65, L=partition.num_columns(65))
    with torch.no_grad():
        inputs["level_scales"].fill_(1.0)
    linear = operator({**inputs, "level_scales": inputs["level_scales"][..., :1]}).output
    assert relative_error(operator(inputs, partition=partition).output, linear) < EXACT


PIECES = [[1] * 9, [5, 1, 1, 30], [17, 16, 2, 65], [64, 3, 1, 40]]


@every_operator
@every_partition
@pytest.mark.parametrize("cuts", PIECES, ids=str)
def test_pieces_equal_the_whole_with_every_gradient(operator, partition, cuts):
    T = sum(cuts)
    for L in columns(partition, T)[1:]:
        inputs = operator.inputs(B=1, T=T, L=L, K=3, V=2, H=2)
        options = dict(chunk_size=4, partition=partition)
        whole = operator(inputs, output_final_state=True, **options)
        output = check_pieces(operator, inputs, cuts, whole, EXACT, **options)
        assert relative_error(output, operator.dense(inputs, partition)) < EXACT


@every_operator
@every_partition
def test_the_recurrence_leaves_the_same_state(operator, partition):
    for T, L in ((1, 3), (16, 5), (37, 4), (70, partition.num_columns(70) - 1), (40, 50)):
        inputs = operator.inputs(B=1, T=T, L=L, K=3, V=2, H=2)
        options = dict(chunk_size=4, partition=partition, output_final_state=True)
        fast, slow = (operator(inputs, impl=impl, **options) for impl in ("torch", "reference"))
        assert fast.final_state.partition == slow.final_state.partition == (partition if partition != FENWICK else None)
        for name, part in parts(fast.final_state).items():
            assert torch.allclose(part, parts(slow.final_state)[name], rtol=EXACT, atol=EXACT), (name, T, L)
        more = operator.inputs(B=1, T=9, L=L, K=3, V=2, H=2)
        outputs = [
            operator(more, initial_state=result.final_state, impl=impl, **options).output
            for result, impl in ((fast, "reference"), (slow, "torch"))
        ]
        assert relative_error(*outputs) < EXACT


@every_operator
@every_partition
@pytest.mark.parametrize("impl", ["torch", "reference"])
@torch.no_grad()
def test_steps_equal_the_whole(operator, partition, impl):
    """Rows at positions of their own, some of them not active at times."""
    step = log_linear_delta_rule_step if operator.delta else log_linear_attention_step
    T, starts = 100 if impl == "torch" else 40, (0, 5, 21)
    for L in (2, 6, partition.num_columns(T) - 1, partition.num_columns(T) + 2):
        inputs = {name: x.detach() for name, x in operator.inputs(B=3, T=T, L=L, K=3, V=2, H=2).items()}
        expected = operator.dense(inputs, partition)
        sizes = dict(num_levels=L, chunk_size=4, groups=2, heads=2, key_dim=3, value_dim=2, **operator.kind)
        state = DecodeState.zeros(3, partition=partition, dtype=torch.float64, **sizes)
        for row, start in enumerate(starts):
            if start:
                prompt = {name: x[row : row + 1, :start] for name, x in inputs.items()}
                options = dict(chunk_size=4, partition=partition, output_final_state=True)
                single = operator(prompt, **options).final_state
                for own, new in zip(state.fenwick.tensors, single.tensors, strict=True):
                    own[row] = new[0]
        state = DecodeState.of(state.fenwick)
        at = list(starts)
        for turn in range(T):
            active = torch.tensor([at[row] < T and (turn + row) % 5 > 0 for row in range(3)])
            rows, times = torch.arange(3), torch.tensor(at).clamp(max=T - 1)
            y = step(*(x[rows, times] for x in inputs.values()), state, active=active, impl=impl)
            for row in range(3):
                if active[row]:
                    assert torch.allclose(y[row], expected[row, at[row]], rtol=1e-10, atol=1e-11), (turn, row, L)
                    at[row] += 1
        assert min(at) > T // 2


@every_operator
@every_partition
@pytest.mark.parametrize("ends", [[0, 1, 40], [0, 3, 3, 20, 90], [0, 16, 32, 48], [0, 0, 70, 70]], ids=str)
def test_packed_equals_separate_with_every_gradient(operator, partition, ends):
    inputs = operator.inputs(B=1, T=ends[-1], L=partition.num_columns(30))
    options = dict(chunk_size=4, partition=partition, output_final_state=True)
    packed = operator(inputs, cu_seqlens=torch.tensor(ends), **options)
    documents = [(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True) if b > a]
    separate = [operator({name: x[:, a:b] for name, x in inputs.items()}, **options) for a, b in documents]
    check_equal(inputs, packed.output, torch.cat([one.output for one in separate], 1))
    rows = [row for row, (a, b) in enumerate(zip(ends[:-1], ends[1:], strict=True)) if b > a]
    for name, part in parts(packed.final_state).items():
        expected = torch.cat([parts(one.final_state)[name] for one in separate])
        assert torch.allclose(part[rows], expected, rtol=EXACT, atol=EXACT), name


@every_operator
@every_partition
def test_packed_sequences_continue_at_positions_of_their_own(operator, partition):
    lengths, more, L = [3, 17, 70], 30, partition.num_columns(60)
    sequences = [operator.inputs(B=1, T=length + more, L=L) for length in lengths]
    first = {
        name: torch.cat([x[name][:, :n] for x, n in zip(sequences, lengths, strict=True)], 1) for name in sequences[0]
    }
    second = {
        name: torch.cat([x[name][:, n:] for x, n in zip(sequences, lengths, strict=True)], 1) for name in sequences[0]
    }
    options = dict(chunk_size=4, partition=partition)
    state = operator(first, cu_seqlens=torch.tensor([0, 3, 20, 90]), output_final_state=True, **options).final_state
    output = operator(second, cu_seqlens=torch.tensor([0, 30, 60, 90]), initial_state=state, **options).output
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        expected = operator.dense(sequence, partition)[0, length:]
        assert relative_error(output[0, row * more : (row + 1) * more], expected) < EXACT


@every_operator
@every_partition
@pytest.mark.parametrize("position", [10**12 + 3, 2**61 - 5], ids=str)
def test_a_sequence_starts_anywhere_in_the_tree(operator, partition, position):
    """As the recurrence from there, by tables that do not grow with the position."""
    inputs, results = operator.inputs(B=1, T=40, L=9, K=3, V=2, H=2), []
    sizes = dict(num_levels=9, chunk_size=4, groups=2, heads=2, key_dim=3, value_dim=2, **operator.kind)
    start = FenwickState.zeros(1, partition=partition, position=torch.tensor([position]), dtype=torch.float64, **sizes)
    for impl in ("torch", "reference"):
        options = dict(chunk_size=4, partition=partition, impl=impl, output_final_state=True)
        result = operator(inputs, initial_state=start, **options)
        results.append([result.output, *parts(result.final_state).values()])
    for fast, slow in zip(*results, strict=True):
        assert torch.allclose(fast, slow, rtol=EXACT, atol=EXACT)


@every_operator
@every_partition
def test_the_future_does_not_leak_and_two_runs_give_the_same_bits(operator, partition):
    inputs = operator.inputs(T=100, L=partition.num_columns(60))
    changed = {name: x.detach().clone() for name, x in inputs.items()}
    for x in changed.values():
        x[:, 53:] *= 0.5
    before, after = (operator(x, partition=partition, chunk_size=4).output[:, :53] for x in (inputs, changed))
    assert torch.equal(before, after)
    runs, weights = [], None
    for _ in range(2):
        output = operator(inputs, partition=partition, chunk_size=4).output
        weights = weights or random_loss(output)
        runs.append([output, *gradients([output], weights, list(inputs.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@every_operator
@every_partition
def test_every_result_is_written(operator, partition):
    """With fresh memory filled with NaN, nothing unwritten can pass for a result."""
    inputs = operator.inputs(T=90, L=partition.num_columns(60))
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        result = operator(inputs, chunk_size=4, partition=partition, output_final_state=True)
        grads = torch.autograd.grad(result.output.sum(), list(inputs.values()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert relative_error(result.output, operator.dense(inputs, partition)) < EXACT
    assert all(bool(x.isfinite().all()) for x in [*grads, *parts(result.final_state).values()])


@every_operator
def test_a_state_serves_its_own_partition_alone(operator):
    made, other = Partition(4), Partition(4, 4)
    inputs = operator.inputs(T=9)
    state = operator(inputs, chunk_size=16, partition=made, output_final_state=True).final_state
    for partition in (other, FENWICK):
        text = f"initial_state was made with {made}, got {partition}"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            operator(inputs, chunk_size=16, partition=partition, initial_state=state)
    binary = operator(inputs, chunk_size=16, output_final_state=True).final_state
    with pytest.raises(ValueError, match=re.escape(f"initial_state was made with {FENWICK}, got {made}")):
        operator(inputs, chunk_size=16, partition=made, initial_state=binary)
    with pytest.raises(ValueError, match=re.escape(f"state was made with {made}, got {Partition(4, 1, 1024)}")):
        held = operator(inputs, chunk_size=16, partition=Partition(4, 1, 1024), output_final_state=True).final_state
        DecodeState.of(held).copy_(state)


@pytest.mark.parametrize(
    "partition, text",
    [
        (None, "partition must be a Partition, got None"),
        (4, "partition must be a Partition, got 4"),
        (Partition(2, 8192), "partition must have a finest_block of at most 4096, got 8192"),
    ],
    ids=str,
)
def test_a_partition_that_no_operator_takes(partition, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        OPERATORS[0](OPERATORS[0].inputs(), partition=partition)
    sizes = dict(num_levels=6, chunk_size=4, groups=2, heads=4, key_dim=5, value_dim=3, delta_rule=True)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        FenwickState.zeros(2, partition=partition, **sizes)


@pytest.mark.parametrize("partition", [Partition(128), Partition(2, 1, 64)], ids=str)
@parametrize(SCALAR_GATES)
def test_the_kernels_refuse_other_partitions_in_one_line(operator, partition):
    pytest.importorskip("triton")
    inputs = operator.inputs(T=9, dtype=torch.float32)
    text = f"{partition} needs impl='torch': impl='triton' takes a radix up to 64 without a largest block"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        operator(inputs, partition=partition, impl="triton")


@every_operator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_cost_one_rounding(operator, dtype):
    """Everything between the inputs and the output is float32, so the error is that of rounding the exact output."""
    inputs = operator.inputs(T=100, K=16, V=8, L=16, dtype=dtype)
    double = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected = operator(double, partition=RADIX_4, chunk_size=16).output
    output = operator(inputs, partition=RADIX_4, chunk_size=16).output
    assert output.dtype == dtype
    assert relative_error(output, expected) < 1.02 * relative_error(expected.to(dtype), expected)
    weights = random_loss(output)
    actual = gradients([output], weights, list(inputs.values()))
    exact = gradients([expected], tuple(w.double() for w in weights), list(double.values()))
    for name, a, e in zip(inputs, actual, exact, strict=True):
        assert a.dtype == inputs[name].dtype
        assert relative_error(a, e) < 1.02 * relative_error(e.to(a.dtype), e) + 6e-7, name


@every_operator
@pytest.mark.parametrize("partition", [Partition(4), Partition(16, 16)], ids=str)
def test_float32_error(operator, partition):
    """Output and every gradient are about as near to float64 as the recurrence in float32 is."""
    inputs = operator.inputs(B=1, T=200, K=16, V=8, L=partition.num_columns(150), dtype=torch.float32)
    double = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    weights, results = None, []
    for x, impl in ((inputs, "torch"), (inputs, "reference"), (double, "torch")):
        output = operator(x, chunk_size=16, partition=partition, impl=impl).output
        weights = weights or random_loss(output)
        results.append([output, *gradients([output], tuple(w.to(x["q"].dtype) for w in weights), list(x.values()))])
    for name, actual, twin, exact in zip(["output", *inputs], *results, strict=True):
        assert excess(actual, twin, exact) <= FLOAT32_FACTOR, name


@every_operator
@pytest.mark.parametrize("kind", ["alone", "packed", "continued"])
def test_a_compiled_call_has_the_same_numbers_and_gradients(operator, kind):
    """One graph, whose state has its partition; packed lengths and positions are values in it."""
    torch._dynamo.reset()
    sizes = dict(B=1 if kind == "packed" else 2, G=1, H=2, K=3, V=2, L=6)
    inputs, options = operator.inputs(T=21, **sizes), dict(chunk_size=4, partition=RADIX_4, output_final_state=True)
    if kind == "continued":
        state = operator(operator.inputs(T=7, **sizes), **options).final_state.detach()
        options["initial_state"] = state
    elif kind == "packed":
        options["cu_seqlens"] = torch.tensor([0, 3, 3, 21])

    def call(*tensors):
        return operator(dict(zip(inputs, tensors, strict=True)), **options)

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        output, state = function(*inputs.values())
        assert state.partition == RADIX_4
        torch.manual_seed(3)
        tensors = [output, *parts(state).values()]
        results.append([*tensors, *gradients(tensors, random_loss(*tensors), list(inputs.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_operator
@torch.no_grad()
def test_compiled_steps_are_one_graph(operator):
    torch._dynamo.reset()
    step = log_linear_delta_rule_step if operator.delta else log_linear_attention_step
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    inputs = operator.inputs(T=40, G=1, H=2, K=3, V=2, L=6)
    sizes = dict(num_levels=6, chunk_size=4, groups=1, heads=2, key_dim=3, value_dim=2, **operator.kind)
    states = [DecodeState.zeros(2, partition=RADIX_4, dtype=torch.float64, **sizes) for _ in range(2)]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for t in range(40):
        token = [x[:, t] for x in inputs.values()]
        outputs = [function(*token, state) for function, state in zip((compiled, step), states, strict=True)]
        assert relative_error(*outputs) < 1e-13 or float(outputs[1].norm()) < 1e-13
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1

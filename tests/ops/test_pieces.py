"""A sequence in pieces, packed with others, or in a batch gives what it gives alone and whole."""

import pytest
import torch

from loglinear.fenwick import num_blocks
from loglinear.kernels.torch import schedule
from loglinear.ops import FenwickState
from tests.ops.operators import OPERATORS, check_pieces, gradients, parts, random_loss, relative_error

EXACT = 1e-10

pytestmark = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(
    "chunk_size, levels, cuts",
    [
        (4, 9, [1, 1, 1, 1, 1, 7, 3, 20]),
        (4, 1, [5, 1, 1, 1, 30]),
        (4, 4, [3] * 11),
        (4, 5, [1] * 37),
        (2, 30, [9, 9, 9, 1, 1, 9]),
        (64, 9, [30, 40, 1, 1]),
    ],
    ids=str,
)
def test_pieces_equal_the_whole_with_every_gradient(operator, chunk_size, levels, cuts, impl):
    inputs = operator.inputs(T=sum(cuts), L=levels)
    whole = operator(inputs, chunk_size=chunk_size, output_final_state=True, impl="reference")
    check_pieces(operator, inputs, cuts, whole, EXACT / 10, chunk_size=chunk_size, impl=impl)


@pytest.mark.parametrize("levels", [1, 4, 5, 9])
@pytest.mark.parametrize("ends", [[0, 1, 40], [0, 3, 3, 20, 40], [0, 16, 32, 40], [0, 0, 40, 40]], ids=str)
def test_packed_equals_separate_with_every_gradient(operator, levels, ends):
    inputs = operator.inputs(B=1, T=40, L=levels)
    packed = operator(inputs, cu_seqlens=torch.tensor(ends), chunk_size=4, output_final_state=True)
    documents = list(zip(ends[:-1], ends[1:], strict=True))
    separate = [
        operator({name: x[:, a:b] for name, x in inputs.items()}, chunk_size=4, output_final_state=True)
        for a, b in documents
        if b > a
    ]
    output = torch.cat([one.output for one in separate], 1)
    assert relative_error(packed.output, output) < EXACT
    rows = [row for row, (a, b) in enumerate(documents) if b > a]
    for name, part in parts(packed.final_state).items():
        expected = torch.cat([parts(one.final_state)[name] for one in separate])
        assert torch.allclose(part[rows], expected, rtol=EXACT, atol=EXACT), name
        assert not part[[row for row in range(len(documents)) if row not in rows]].any(), name
    weights = random_loss(output)
    actual = gradients([packed.output], weights, list(inputs.values()))
    expected = gradients([output], weights, list(inputs.values()))
    for name, a, e in zip(inputs, actual, expected, strict=True):
        assert relative_error(a, e) < EXACT, name


@pytest.mark.parametrize("levels", [1, 5, 9])
def test_rows_at_different_positions_continue_together(operator, levels):
    """Prefill three prompts of different lengths as one packed batch, then decode all of them a token at a time."""
    lengths, steps = [3, 17, 32], 22
    sequences = [operator.inputs(B=1, T=length + steps, L=levels) for length in lengths]
    prompts = {
        name: torch.cat([x[name][:, :n] for x, n in zip(sequences, lengths, strict=True)], 1) for name in sequences[0]
    }
    cu_seqlens = torch.tensor([0, 3, 20, 52])
    state = operator(prompts, cu_seqlens=cu_seqlens, chunk_size=4, output_final_state=True).final_state
    decoded = []
    for step in range(steps):
        token = {
            name: torch.cat([x[name][:, n + step : n + step + 1] for x, n in zip(sequences, lengths, strict=True)])
            for name in sequences[0]
        }
        out = operator(token, chunk_size=4, initial_state=state, output_final_state=True)
        state = out.final_state
        decoded.append(out.output)
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        expected = operator.dense(sequence)[0, length:]
        assert relative_error(torch.cat(decoded, 1)[row], expected) < EXACT


def test_a_packed_piece_continues_packed_states(operator):
    """Sequences without new tokens keep their state."""
    first, second = (operator.inputs(B=1, T=30) for _ in range(2))
    options = dict(chunk_size=4, output_final_state=True)
    start = operator(first, cu_seqlens=torch.tensor([0, 7, 30]), **options).final_state
    end = operator(second, cu_seqlens=torch.tensor([0, 0, 30]), initial_state=start, **options)
    for name, part in parts(end.final_state).items():
        assert torch.allclose(part[0], parts(start)[name][0], atol=EXACT), name
    joined = {name: torch.cat([first[name][:, 7:], second[name]], 1) for name in first}
    assert relative_error(end.output[0], operator.dense(joined)[0, 23:]) < EXACT
    assert end.final_state.position.tolist() == [7, 53]


def test_a_call_leaves_the_given_state_alone(operator):
    state = operator(operator.inputs(T=7), chunk_size=4, output_final_state=True).final_state
    kept = [None if part is None else part.clone() for part in state]
    for T in (1, 1, 9):
        operator(operator.inputs(T=T), chunk_size=4, initial_state=state, output_final_state=True)
    assert all(a is None or torch.equal(a, b) for a, b in zip(state, kept, strict=True))


def test_state_rows_can_be_reordered(operator):
    inputs, nexts = operator.inputs(T=11), operator.inputs(T=1)
    state = operator(inputs, chunk_size=4, output_final_state=True).final_state
    order = torch.tensor([1, 0])
    plain = operator(nexts, chunk_size=4, initial_state=state).output
    swapped = operator(
        {name: x[order] for name, x in nexts.items()}, chunk_size=4, initial_state=state.index_select(order)
    )
    assert torch.equal(swapped.output, plain[order])


@pytest.mark.parametrize("levels, chunk_size", [(1, 64), (9, 4), (5, 4)])
def test_the_size_of_a_state_depends_on_levels_and_chunk_size_alone(operator, levels, chunk_size):
    states = [
        operator(operator.inputs(T=T, L=levels), chunk_size=chunk_size, output_final_state=True).final_state
        for T in (1, 50)
    ]
    zero = FenwickState.zeros(
        2,
        num_levels=levels,
        chunk_size=chunk_size,
        groups=2,
        heads=4,
        key_dim=5,
        value_dim=3,
        **operator.kind,
        dtype=torch.float64,
    )
    assert states[0].nbytes == states[1].nbytes == zero.nbytes
    assert states[0].blocks.shape[1] == num_blocks(levels, chunk_size)
    first = operator(operator.inputs(T=3, L=levels), chunk_size=chunk_size, initial_state=zero)
    assert first.output.isfinite().all()


def test_training_after_inference_mode(operator):
    """The caches of a call under inference_mode must serve a training call of the same shape later."""
    inputs = operator.inputs(T=21, L=7, V=11)
    state = operator(inputs, chunk_size=4, output_final_state=True).final_state.detach()
    token = operator.inputs(T=1, L=7, V=11)

    def call():
        whole = operator(inputs, chunk_size=4).output
        return whole, operator(token, chunk_size=4, initial_state=state).output

    schedule.cache_clear()
    with torch.inference_mode():
        first = [x.clone() for x in call()]
    second = call()
    sum(x.sum() for x in second).backward()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert inputs["level_scales"].grad.abs().sum() > 0


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("levels", [1, 4, 6, 9])
@pytest.mark.parametrize("starts", [[0, 1], [3, 4], [5, 31], [32, 33], [64, 100]], ids=str)
def test_an_empty_state_at_a_position_is_that_many_tokens_that_write_nothing(operator, starts, levels, impl):
    """The outputs are the dense operator's last ones, behind tokens with v = 0 and no decay; so are all gradients."""
    T = 37
    inputs = operator.inputs(B=2, T=T, G=2, H=4, K=5, V=3, L=levels)
    start = FenwickState.zeros(
        2,
        num_levels=levels,
        chunk_size=4,
        groups=2,
        heads=4,
        key_dim=5,
        value_dim=3,
        **operator.kind,
        position=torch.tensor(starts, dtype=torch.int32),
        dtype=torch.float64,
    )
    out = operator(inputs, chunk_size=4, initial_state=start, output_final_state=True, impl=impl)
    rows = []
    for b, p in enumerate(starts):
        front = {name: x.detach() for name, x in operator.inputs(B=1, T=p, L=levels).items()}
        front |= {name: torch.zeros_like(front[name]) for name in ("v", "log_decay")}
        row = {name: torch.cat([front[name], inputs[name][b : b + 1]], 1) for name in inputs}
        rows.append(operator.dense(row)[0, p:])
    expected = torch.stack(rows)
    assert relative_error(out.output, expected) < EXACT
    assert out.final_state.position.tolist() == [p + T for p in starts]
    weights = random_loss(out.output)
    actual, wanted = (gradients([y], weights, list(inputs.values())) for y in (out.output, expected))
    for name, a, e in zip(inputs, actual, wanted, strict=True):
        assert relative_error(a, e) < EXACT, name

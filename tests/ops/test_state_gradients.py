"""A FenwickState carries gradients, a DecodeState none; neither depends on the mode in which it was made."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from loglinear.ops import DecodeState
from tests.ops.operators import OPERATORS, gradients, parts, random_loss, relative_error
from tests.ops.test_step import sizes, take_step, token_at

EXACT = 1e-10
MODES = {"grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}

pytestmark = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)


def piece_of(inputs, start, end):
    return {name: x[:, start:end] for name, x in inputs.items()}


def leaves(inputs):
    return {name: x.detach().requires_grad_() for name, x in inputs.items()}


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_go_back_to_where_they_are_cut(operator, impl, mode):
    """A first piece in `mode`, then two with gradients, equal the last two behind a constant state."""
    inputs, options = operator.inputs(T=21, L=5), dict(chunk_size=4, output_final_state=True, impl=impl)
    with MODES[mode]():
        first = operator(piece_of(inputs, 0, 6), **options).final_state
    if mode == "grad":
        first = first.detach()
    second = operator(piece_of(inputs, 6, 13), initial_state=first, **options)
    third = operator(piece_of(inputs, 13, 21), initial_state=second.final_state, **options)
    actual_outputs = [second.output, third.output, *parts(third.final_state).values()]

    start = operator({n: x.detach() for n, x in piece_of(inputs, 0, 6).items()}, **options).final_state
    rest = leaves(piece_of(inputs, 6, 21))
    whole = operator(rest, initial_state=start, **options)
    outputs = [*whole.output.split([7, 8], 1), *parts(whole.final_state).values()]
    weights = random_loss(*outputs)
    expected = gradients(outputs, weights, list(rest.values()))
    actual = gradients(actual_outputs, weights, list(inputs.values()))
    for name, a, e in zip(inputs, actual, expected, strict=True):
        assert not a[:, :6].any(), name
        assert relative_error(a[:, 6:], e) < EXACT, name


def test_no_gradient_goes_back_through_a_decode_state(operator):
    inputs = operator.inputs(T=9, L=5)
    options = dict(chunk_size=4, output_final_state=True)
    state = operator(piece_of(inputs, 0, 5), **options).final_state
    decode = DecodeState.of(state)
    kept = [part for part in (*decode.fenwick, decode.inverse) if part is not None]
    assert not any(part.requires_grad for part in kept)
    output = operator(piece_of(inputs, 5, 9), initial_state=decode.fenwick, **options).output
    actual = gradients([output], random_loss(output), list(inputs.values()))
    assert all(not grad[:, :5].any() for grad in actual)
    assert all(grad[:, 5:].any() for grad in actual)
    for twin in (copy.deepcopy(decode), pickle.loads(pickle.dumps(decode))):
        token = token_at(inputs, 5, torch.float64)
        again = DecodeState.of(state)
        assert torch.equal(take_step(operator, token, twin), take_step(operator, token, again))


@pytest.mark.parametrize("mode", MODES)
def test_a_decode_state_may_be_stepped_in_any_mode(operator, mode):
    """Made, selected and read in one mode, used in another."""
    inputs = operator.inputs(T=5, L=5)
    whole = operator(inputs, chunk_size=4).output
    with MODES[mode]():
        state = DecodeState.zeros(
            2,
            num_levels=5,
            chunk_size=4,
            groups=2,
            heads=4,
            key_dim=5,
            value_dim=3,
            **operator.kind,
            dtype=torch.float64,
        )
        fresh = DecodeState.of(sizes(operator, 2, 5, 4, dtype=torch.float64))
        state = state.index_select(torch.tensor([0, 1]))
    for t in range(5):
        for one in (state, fresh):
            assert relative_error(take_step(operator, token_at(inputs, t, torch.float64), one), whole[:, t]) < EXACT


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_gradient_while_the_state_stays(operator, use_reentrant):
    """The operator reads the state again in the backward pass; a copy of it may be stepped before."""
    inputs = operator.inputs(T=9, L=5)
    start = operator(piece_of(inputs, 0, 7), chunk_size=4, output_final_state=True).final_state.detach()
    state, rest = DecodeState.of(start), leaves(piece_of(inputs, 7, 9))

    def call(*tensors):
        given = dict(zip(rest, tensors, strict=True))
        return operator(given, initial_state=state.fenwick, chunk_size=4).output

    output, expected = checkpoint(call, *rest.values(), use_reentrant=use_reentrant), call(*rest.values())
    take_step(operator, token_at(inputs, 7, torch.float64), DecodeState.of(state.fenwick))
    runs = []
    weights = random_loss(output)
    for y in (output, expected):
        for x in rest.values():
            x.grad = None
        y.backward(*weights)
        runs.append([x.grad for x in rest.values()])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("write", ["step", "copy_"])
def test_a_state_may_move_before_the_backward_of_an_operator(operator, write, impl):
    """The operator works on a copy; without gradients it does not need one."""
    inputs = operator.inputs(T=9, L=5)
    options = dict(chunk_size=4, output_final_state=True)
    start = operator(piece_of(inputs, 0, 7), **options).final_state.detach()
    state, rest = DecodeState.of(start), leaves(piece_of(inputs, 7, 9))
    outputs = [operator(rest, initial_state=one, chunk_size=4, impl=impl).output for one in (state.fenwick, start)]
    if write == "step":
        take_step(operator, token_at(inputs, 7, torch.float64), state)
    else:
        state.copy_(sizes(operator, 2, 5, 4, dtype=torch.float64))
    weights = random_loss(outputs[0])
    actual, expected = (gradients([output], weights, list(rest.values())) for output in outputs)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))

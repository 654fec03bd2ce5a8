"""A gate for each channel of the keys: what scalar gates have no test for."""

import logging
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from loglinear.cli import info
from loglinear.ops import (
    IMPLEMENTATIONS,
    DecodeState,
    FenwickState,
    announcement,
    api,
    impl_triton,
    log_linear_attention,
    log_linear_attention_step,
    log_linear_delta_rule_step,
    step,
)
from loglinear.partition import FENWICK, Partition
from tests.ops.operators import (
    DIAGONAL_GATES,
    SCALAR_GATES,
    excess,
    gradients,
    parametrize,
    parts,
    random_loss,
    relative_error,
)
from tests.ops.test_step import take_step, token_at

EXACT = 1e-10
FACTOR = (
    6  # the error in float32 over that of the float32 recurrence: measured 1.4 (outputs and states) and 3.4 (gradients)
)


def strong_log_decay(kind, shape):
    """Log decays [B, T, H, K] of mean -2.5 and far stronger ones."""
    log_decay = -5.0 * torch.rand(shape, dtype=torch.float64)
    if kind == "single tokens":
        log_decay[:, ::5] = -7.0
        log_decay[:, 3::11, :, 1] = -50.0
    if kind == "resets":
        log_decay[:, ::7, :, :2] = -torch.inf
        log_decay[:, 5::13] = -1000.0
    if kind == "channels apart":  # one keeps everything, one loses everything
        log_decay[..., 0], log_decay[..., 1] = 0.0, -60.0
    return log_decay


def results(operator, inputs, weights=None, **options):
    """The output, the parts of the final state, every gradient, and the weights of their loss."""
    out = operator(inputs, output_final_state=True, **options)
    tensors = [out.output, *parts(out.final_state).values()]
    weights = random_loss(*tensors) if weights is None else [w.to(out.output.dtype) for w in weights]
    return tensors, gradients(tensors, weights, list(inputs.values())), weights


@pytest.mark.parametrize("partition", [FENWICK, Partition(4, 4)], ids=str)
@pytest.mark.parametrize("kind", ["mean -2.5", "single tokens", "resets", "channels apart"])
@parametrize(DIAGONAL_GATES)
def test_strong_gates_are_exact_with_every_gradient(operator, kind, partition):
    """Far below the exponents that exp(-G) of a whole chunk of 32 tokens can hold, in float64 and float32."""
    exact_inputs = operator.inputs(B=2, T=101, G=2, H=4, K=6, V=5, L=7)
    exact_inputs["log_decay"] = strong_log_decay(kind, exact_inputs["log_decay"].shape).requires_grad_()
    options = dict(chunk_size=32, partition=partition)
    exact, exact_grads, weights = results(operator, exact_inputs, impl="reference", **options)
    tensors, grads, _ = results(operator, exact_inputs, weights, impl="torch", **options)
    for actual, expected in zip([*tensors, *grads], [*exact, *exact_grads], strict=True):
        assert relative_error(actual, expected) < EXACT
    inputs = {name: x.detach().float().requires_grad_() for name, x in exact_inputs.items()}
    exact_inputs = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}  # the rounded inputs
    exact, exact_grads, _ = results(operator, exact_inputs, weights, impl="reference", **options)
    single, twin = (results(operator, inputs, weights, impl=impl, **options) for impl in ("torch", "reference"))
    for actual, same_dtype, expected in zip(
        [*single[0], *single[1]], [*twin[0], *twin[1]], [*exact, *exact_grads], strict=True
    ):
        assert excess(actual, same_dtype, expected) < FACTOR


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(("scalar", "diagonal"), [*zip(SCALAR_GATES, DIAGONAL_GATES, strict=True)], ids=str)
def test_equal_channels_are_the_scalar_gate(scalar, diagonal, impl):
    inputs = scalar.inputs(T=45, K=5, L=6, decay=3.0)
    log_decay = inputs["log_decay"].detach()[..., None].expand(2, 45, 4, 5).clone().requires_grad_()
    expected, expected_grads, weights = results(scalar, inputs, chunk_size=8, impl=impl)
    place = list(parts(scalar(inputs, output_final_state=True).final_state)).index("log_decay") + 1
    weights = [w[..., None].expand(*w.shape, 5) / 5 if n == place else w for n, w in enumerate(weights)]
    tensors, grads, _ = results(diagonal, inputs | {"log_decay": log_decay}, weights, chunk_size=8, impl=impl)
    tensors[place] = tensors[place].mean(-1)
    grads[inputs_place(scalar)] = grads[inputs_place(scalar)].sum(-1)
    for actual, exact in zip([*tensors, *grads], [*expected, *expected_grads], strict=True):
        assert relative_error(actual, exact) < EXACT


def inputs_place(operator):
    return operator.names.index("log_decay")


@parametrize(DIAGONAL_GATES)
def test_one_level_is_the_recurrence_of_the_linear_models(operator):
    """GLA (arXiv 2312.06635) and Kimi Delta Attention (arXiv 2510.26692): decay, erase, write."""
    x = {name: t.detach()[0] for name, t in operator.inputs(B=1, T=40, G=4, H=4, L=3).items()}
    state, outputs = torch.zeros(4, 5, 3, dtype=torch.float64), []
    for t in range(40):
        k, v = x["k"][t, :, :, None], x["v"][t, :, None]
        state = x["log_decay"][t].exp()[..., None] * state
        if operator.delta:
            v = x["beta"][t, :, None, None] * (v - k.mT @ state)
        state = state + k * v
        outputs.append((x["q"][t, :, None] @ state)[:, 0])
    given = {name: t[None] for name, t in x.items()} | {"level_scales": torch.ones(1, 40, 4, 3, dtype=torch.float64)}
    assert relative_error(operator(given, chunk_size=8).output[0], torch.stack(outputs)) < EXACT


@pytest.fixture
def lines(monkeypatch, caplog):
    monkeypatch.setattr(announcement, "_announced", set())
    caplog.set_level(logging.INFO, "loglinear")
    return lambda: [record.getMessage() for record in caplog.records]


NOT_CHECKED = "no GPU has passed all checks of the kernels for a log_decay per key channel: impl='triton' runs them"
STEP = "a step with a log_decay per key channel needs impl='torch': that of impl='triton' takes one per head"


@pytest.mark.interpreter
@parametrize(DIAGONAL_GATES)
def test_the_steps_kernels_refuse_a_diagonal_gate_in_one_line(operator):
    pytest.importorskip("triton")
    inputs = operator.inputs(T=20, dtype=torch.float32)
    state = DecodeState.zeros(
        2, num_levels=9, chunk_size=16, groups=2, heads=4, key_dim=5, value_dim=3, **operator.kind
    )
    with pytest.raises(ValueError, match=f"^{re.escape(STEP)}$"):
        take_step(operator, token_at(inputs, 0, torch.float32), state, impl="triton")
    assert not state.fenwick.position.any()


@parametrize(DIAGONAL_GATES)
def test_auto_runs_torch_on_a_gpu_and_says_why(operator, monkeypatch, lines):
    pytest.importorskip("triton")
    monkeypatch.setattr(impl_triton, "NO_TRITON", None)
    monkeypatch.setitem(api._RUN, "torch", lambda problem: (problem.v, None))
    monkeypatch.setattr(step, "_torch_step", lambda token: token.v)
    sizes = dict(num_levels=8, chunk_size=16, groups=2, heads=4, key_dim=5, value_dim=3, **operator.kind)
    take = log_linear_delta_rule_step if operator.delta else log_linear_attention_step
    with FakeTensorMode():
        shapes = {name: x.shape for name, x in operator.inputs(B=1, T=20, L=8).items()}
        inputs = {name: torch.empty(shape, device="cuda") for name, shape in shapes.items()}
        assert operator(inputs).output is inputs["v"]
        token = [torch.empty(1, *shape[2:], device="cuda") for shape in shapes.values()]
        take(*token, DecodeState.zeros(1, device="cuda", **sizes))
    call, step_ = lines()
    assert call.endswith(f" runs with impl='torch': {NOT_CHECKED}")
    assert step_.endswith(f" runs with impl='torch': {STEP}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_kernels_refuse_the_tiles_that_triton_miscompiles(dtype, monkeypatch):
    pytest.importorskip("triton")
    reasons = []
    monkeypatch.setattr(impl_triton, "NO_TRITON", None)
    monkeypatch.setattr(impl_triton, "_is_interpreted", lambda: False)
    monkeypatch.setitem(api._RUN, "triton", lambda p: (reasons.append(impl_triton.unsupported(p)) or p.v, None))
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 20, 2, 16, device="cuda", dtype=dtype) for _ in range(3))
        log_decay, level_scales = (torch.empty(1, 20, 2, n, device="cuda") for n in (16, 5))
        for chunk_size in (32, 16):
            options = dict(impl="triton", output_final_state=True, chunk_size=chunk_size)
            log_linear_attention(q, k, v, log_decay, level_scales, **options)
    refusal = "K = 16 with a log_decay per key channel in chunks of 16 tokens needs bfloat16 or impl='torch'"
    assert reasons == [None, None if dtype == torch.bfloat16 else refusal]


@parametrize(DIAGONAL_GATES)
def test_auto_will_run_the_kernels_once_a_gpu_has_checked_them(operator, monkeypatch):
    pytest.importorskip("triton")
    from loglinear.kernels.triton import limits

    monkeypatch.setattr(impl_triton, "NO_TRITON", None)
    name = "DIAGONAL_DELTA_RULE_PASSED_ON_A_GPU" if operator.delta else "DIAGONAL_GATE_PASSED_ON_A_GPU"
    monkeypatch.setattr(limits, name, True)
    monkeypatch.setitem(api._RUN, "triton", lambda problem: (problem.v, None))
    with FakeTensorMode():
        shapes = {name: x.shape for name, x in operator.inputs(B=1, T=20, L=8).items()}
        inputs = {name: torch.empty(shape, device="cuda") for name, shape in shapes.items()}
        assert operator(inputs).output is inputs["v"]


@parametrize(DIAGONAL_GATES)
def test_a_state_has_the_gate_of_its_call(operator):
    scalar = SCALAR_GATES[operator.delta]
    ours, other = ("a diagonal gate (a decay per key channel)", "a scalar gate (one decay per head)")
    for mine, its, kinds in ((operator, scalar, (ours, other)), (scalar, operator, (other, ours))):
        inputs = mine.inputs(T=6)
        state = its(its.inputs(T=6), chunk_size=4, output_final_state=True).final_state.detach()
        text = "must be a state of {}, got one of {}".format(*kinds)
        with pytest.raises(ValueError, match=f"^initial_state {re.escape(text)}$"):
            mine(inputs, chunk_size=4, initial_state=state)
        decode = DecodeState.of(state)
        with pytest.raises(ValueError, match=f"^state {re.escape(text)}$"):
            take_step(mine, token_at(inputs, 0, torch.float64), decode)
        whole = mine(inputs, chunk_size=4, output_final_state=True).final_state.detach()
        with pytest.raises(ValueError, match="^state must be a state of a .* gate .*, got one of a .* gate"):
            decode.copy_(whole)


@parametrize(DIAGONAL_GATES)
def test_no_decay_keeps_the_gate_of_a_state(operator):
    """log_decay=None continues a state of either gate."""
    inputs = operator.inputs(T=14)
    head, tail = ({name: x[:, part].detach() for name, x in inputs.items()} for part in (slice(6), slice(6, 14)))
    zeros = torch.zeros_like(tail["log_decay"])
    state = operator(head, chunk_size=4, output_final_state=True).final_state
    for impl in ("torch", "reference"):
        options = dict(chunk_size=4, initial_state=state, output_final_state=True, impl=impl)
        none, zero = (operator(tail | {"log_decay": gate}, **options) for gate in (None, zeros))
        assert torch.equal(none.output, zero.output)
        assert none.final_state.is_diagonal
    decode = DecodeState.of(state)
    token = token_at(tail, 0, torch.float64)
    q, k, v, _, *gates = (token[name][:, 0] for name in operator.names)
    out = (log_linear_delta_rule_step if operator.delta else log_linear_attention_step)(q, k, v, None, *gates, decode)
    assert relative_error(out, zero.output[:, 0]) < EXACT


def test_info_says_which_implementations_have_diagonal_gates(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    info.run(None, None)
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in capsys.readouterr().out.splitlines()]
    gates = {row[0]: row[1] for row in rows if row[0] in IMPLEMENTATIONS and len(row) == 3}
    assert gates == {
        "triton": "scalar, diagonal",
        "torch": "scalar, diagonal",
        "reference": "scalar, diagonal",
    }


def test_a_log_decay_of_other_axes_is_named():
    operator = DIAGONAL_GATES[1]
    inputs = operator.inputs(B=1, T=10)
    for shape, text in (
        ((1, 10, 4, 6), r"\[B, T, H, K\] = \[1, 10, 4, 5\], got \[1, 10, 4, 6\]"),
        ((1, 10), r"\[B, T, H\] = \[1, 10, 4\] or \[B, T, H, K\], got \[1, 10\]"),
    ):
        with pytest.raises(ValueError, match=f"^log_decay must have shape {text}$"):
            operator(inputs | {"log_decay": torch.zeros(shape)})


def test_states_say_which_gate_they_have():
    sizes = dict(num_levels=6, chunk_size=4, groups=1, heads=2, key_dim=3, value_dim=2, delta_rule=True)
    for diagonal in (False, True):
        state = FenwickState.zeros(2, diagonal_gate=diagonal, **sizes)
        assert state.is_diagonal is diagonal
        assert state.log_decay.shape == ((2, 4, 2, 3) if diagonal else (2, 4, 2))
    with pytest.raises(ValueError, match="^diagonal_gate must be True or False, got 1$"):
        FenwickState.zeros(2, diagonal_gate=1, **sizes)

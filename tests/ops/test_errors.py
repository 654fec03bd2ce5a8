"""A wrong argument gets one line that names it, what it was and what was expected."""

import subprocess
import sys

import numpy
import pytest
import torch

from loglinear.ops import DecodeState, FenwickState
from tests.ops.operators import OPERATORS
from tests.ops.test_step import take_step, token_at

DELTA = OPERATORS[1]


def call(changes=None, **options):
    inputs = {name: x.detach() for name, x in DELTA.inputs(B=1, T=10).items()}
    return DELTA(inputs | (changes or {}), chunk_size=4, **options)


@pytest.mark.parametrize(
    "changes, options, text",
    [
        ({"q": torch.zeros(1, 10, 5)}, {}, r"q must have shape \[B, T, G, K\], got \[1, 10, 5\]"),
        ({"v": torch.zeros(10, 4, 3)}, {}, r"v must have shape \[B, T, H, V\] = \[1, 10, H, V\], got \[10, 4, 3\]"),
        ({"v": torch.zeros(1, 10, 3, 3)}, {}, r"H = 3 heads must be a multiple of q's G = 2"),
        ({"v": torch.zeros(1, 9, 4, 3)}, {}, r"v must have shape \[B, T, H, V\] = \[1, 10, H, V\], got \[1, 9, 4, 3\]"),
        ({"v": torch.zeros(1, 10, 0, 3)}, {}, r"v must not be empty"),
        (
            {"k": torch.zeros(1, 10, 2, 6)},
            {},
            r"k must have shape \[B, T, G, K\] = \[1, 10, 2, 5\], got \[1, 10, 2, 6\]",
        ),
        ({"log_decay": torch.zeros(1, 10)}, {}, r"log_decay must have shape \[B, T, H\] = \[1, 10, 4\]"),
        ({"beta": torch.zeros(1, 10, 5)}, {}, r"beta must have shape"),
        ({"beta": None}, {}, r"beta must be a tensor, got NoneType"),
        ({"level_scales": torch.zeros(1, 10, 4)}, {}, r"level_scales must have shape \[B, T, H, L\]"),
        ({"level_scales": torch.zeros(1, 10, 4, 0)}, {}, r"level_scales must not be empty, got shape \[1, 10, 4, 0\]"),
        (
            {"q": torch.zeros(1, 10, 2, 5, dtype=torch.int64)},
            {},
            r"q must hold floats of 16, 32 or 64 bits, got torch.int64",
        ),
        ({}, {"impl": "fast"}, r"impl must be one of \['auto', 'triton', 'torch', 'reference'\], got 'fast'"),
        ({}, {"cu_seqlens": torch.tensor([1, 10])}, r"cu_seqlens must start at 0, got 1"),
        ({}, {"cu_seqlens": torch.tensor([0, 9])}, r"cu_seqlens must end at T = 10, got 9"),
        ({}, {"cu_seqlens": torch.tensor([0, 7, 3, 10])}, r"cu_seqlens must not decrease, got \[0, 7, 3, 10\]"),
        ({}, {"cu_seqlens": torch.tensor([0.0, 10.0])}, r"cu_seqlens must hold integers, got torch.float32"),
        ({}, {"cu_seqlens": torch.tensor([[0, 10]])}, r"cu_seqlens must have shape \[N \+ 1\]"),
        ({}, {"cu_seqlens": torch.tensor([0])}, r"cu_seqlens must have shape \[N \+ 1\]"),
        ({}, {"cu_seqlens": [0, 10]}, r"cu_seqlens must be a tensor of integers, got list"),
        ({}, {"scale": None}, r"scale must be a number, got None"),
        ({}, {"initial_state": torch.zeros(3)}, r"initial_state must be a FenwickState, .* got Tensor"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_the_message_names_the_argument(changes, options, text):
    with pytest.raises(ValueError, match=text) as error:
        call(changes, **options)
    assert "\n" not in str(error.value)


def test_cu_seqlens_need_one_row():
    with pytest.raises(ValueError, match="packed batch with B = 1, got B = 2"):
        DELTA(DELTA.inputs(B=2, T=10), cu_seqlens=torch.tensor([0, 10]))


@pytest.mark.parametrize("chunk_size", [0, -4, 48, 64.0])
def test_chunk_size_must_be_a_power_of_two(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size must be a power of two, got {chunk_size}"):
        OPERATORS[0](OPERATORS[0].inputs(), chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [numpy.int64(4), numpy.uint8(4)])
def test_an_integer_of_numpy_is_an_integer(chunk_size):
    inputs = OPERATORS[0].inputs()
    assert torch.equal(OPERATORS[0](inputs, chunk_size=chunk_size).output, OPERATORS[0](inputs, chunk_size=4).output)


SIZES = dict(num_levels=6, chunk_size=4, groups=2, heads=4, key_dim=5, value_dim=3, delta_rule=True)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(rows=0), "rows must be an integer of at least 1, got 0"),
        (dict(rows=2.0), "rows must be an integer of at least 1, got 2.0"),
        (dict(heads=True), "heads must be an integer of at least 1, got True"),
        (dict(position=torch.tensor([0])), r"position must have shape \[N\] = \[2\], got \[1\]"),
        (dict(position=torch.tensor([0, -1])), r"position must be from 0 to 2\*\*62 - 1, got -1"),
        (dict(heads=3), "heads must be a multiple of groups = 2, got 3"),
        (dict(num_levels=10**8), "num_levels must be at most 64, got 100000000"),
        (dict(chunk_size=3), "chunk_size must be a power of two, got 3"),
        (dict(chunk_size=2**40), "chunk_size must be at most 4096, got 1099511627776"),
        (dict(dtype=torch.bfloat16), "dtype must be float32 or float64, got torch.bfloat16"),
        (dict(delta_rule=None), "delta_rule must be True or False, got None"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [FenwickState, DecodeState])
def test_sizes_that_no_state_has(change, text, kind):
    options = dict(rows=2) | SIZES | change
    with pytest.raises(ValueError, match=f"^{text}$"):
        kind.zeros(options.pop("rows"), **options)


def test_a_decode_state_is_memory_of_its_own():
    """Steps write into it, so what it is made of is checked once, when it is made."""
    state = DecodeState.zeros(2, **SIZES)
    fenwick = state.fenwick
    square = fenwick._replace(v=torch.zeros(2, 4, 4, 3).transpose(1, 2))
    alias = fenwick._replace(beta=fenwick.log_decay)
    wrong = [
        (square, state.inverse, r"fenwick.v must be contiguous memory of its own, got strides \(48, 3, 12, 1\)"),
        (alias, state.inverse, "fenwick.beta must be memory of its own, got that of fenwick.log_decay"),
        (fenwick._replace(k=fenwick.k.clone().requires_grad_()), state.inverse, "fenwick.k must carry no gradients"),
        (fenwick._replace(position=fenwick.position.int()), state.inverse, "fenwick.position must hold int64"),
        (fenwick._replace(position=fenwick.position - 1), state.inverse, "position must be from 0 to .*, got -1"),
        (fenwick, None, "inverse must be a tensor if fenwick has a beta: make the state with DecodeState.of"),
        (fenwick._replace(beta=None), state.inverse, "inverse must be None if fenwick has no beta"),
        (fenwick, state.inverse[:1], r"inverse must have shape \[N, C, H, C\] = \[2, 4, 4, 4\], got \[1, 4, 4, 4\]"),
    ]
    for parts_of, inverse, text in wrong:
        with pytest.raises(ValueError, match=text):
            DecodeState(parts_of, inverse)


def test_rows_that_a_state_does_not_have():
    state = DecodeState.zeros(2, **SIZES)
    for rows, text in (
        (torch.tensor([0, 2]), "rows must be from 0 to 1, .* got 2"),
        (torch.tensor([-1]), "rows must be from 0 to 1, .* got -1"),
        (torch.tensor([True]), "rows must hold int32 or int64, got torch.bool"),
        ([0, 1], "rows must be a tensor, got list"),
        (torch.tensor([], dtype=torch.int64), "rows must not be empty"),
    ):
        for one in (state, state.fenwick):
            with pytest.raises(ValueError, match=text):
                one.index_select(rows)


@pytest.mark.parametrize(
    "other, text",
    [
        (dict(delta_rule=False), "state must be a state of the delta rule .with beta., got one of a gate without"),
        (dict(dtype=torch.float64), "state must hold torch.float32, as the state that it is copied into"),
        (dict(chunk_size=8), "state was made with chunk_size 8, got chunk_size 4"),
        (dict(num_levels=9), r"state.blocks must have shape \[N, M, H, K, V\] = \[2, 3, 4, 5, 3\], got \[2, 6,"),
    ],
    ids=str,
)
def test_a_state_that_does_not_fit_is_not_copied(other, text):
    state = DecodeState.zeros(2, **SIZES)
    with pytest.raises(ValueError, match=text):
        state.copy_(FenwickState.zeros(2, **SIZES | other))


@pytest.mark.parametrize(
    "other, options, text",
    [
        (dict(B=2), dict(chunk_size=4), r"initial_state.position must have shape \[N\] = \[1\], got \[2\]"),
        (dict(L=12), dict(chunk_size=4), r"initial_state.blocks must have shape"),
        (dict(H=2), dict(chunk_size=4), r"initial_state.blocks must have shape"),
        (dict(), dict(chunk_size=8), r"initial_state was made with chunk_size 8, got chunk_size 4"),
    ],
)
def test_a_state_of_another_shape(other, options, text):
    state = DELTA(DELTA.inputs(**{"B": 1, **other}), output_final_state=True, **options).final_state
    with pytest.raises(ValueError, match=text):
        call(initial_state=state)


def test_a_state_of_the_other_operator():
    state = OPERATORS[0](OPERATORS[0].inputs(B=1), chunk_size=4, output_final_state=True).final_state
    with pytest.raises(
        ValueError, match="initial_state must be a state of the delta rule .*, got one of a gate without"
    ):
        call(initial_state=state)


def test_a_state_of_another_dtype():
    state = DELTA(DELTA.inputs(B=1), chunk_size=4, output_final_state=True).final_state
    with pytest.raises(ValueError, match="initial_state.position must hold integers, got torch.float32"):
        call(initial_state=state._replace(position=state.position.float()))
    with pytest.raises(ValueError, match="initial_state.blocks must hold float32 or float64, got torch.int64"):
        call(initial_state=state._replace(blocks=state.blocks.long()))


POSITIVE = r"^log_decay must be at most 0 \(the logarithm of the decay\), got a maximum of 0.9$"


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.9, torch.nn.Parameter])
def test_a_decay_is_no_log_decay(operator, dtype, decay):
    """The likeliest mistake of a newcomer: one number of the decay itself suffices."""
    inputs = operator.inputs(T=7, dtype=dtype)
    wrong = inputs["log_decay"].detach().clone()
    wrong[1, 5, 3] = 0.9
    if decay is torch.nn.Parameter:
        wrong = decay(wrong)
    for impl in ("torch", "reference", "auto"):
        with pytest.raises(ValueError, match=POSITIVE):
            operator(inputs | {"log_decay": wrong}, impl=impl)
    state = DecodeState.of(operator(inputs, output_final_state=True, chunk_size=4).final_state)
    before = state.fenwick.position.clone()
    with torch.no_grad(), pytest.raises(ValueError, match=POSITIVE):
        take_step(operator, token_at(inputs | {"log_decay": wrong}, 5, dtype), state)
    assert torch.equal(state.fenwick.position, before)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_nan_hides_no_decay(operator):
    inputs = operator.inputs(T=7)
    wrong = inputs["log_decay"].detach().clone()
    wrong[1, 5, 3], wrong[0, 2, 1], wrong[1, 5, 0] = 0.9, torch.nan, torch.nan
    with pytest.raises(ValueError, match=POSITIVE):
        operator(inputs | {"log_decay": wrong})
    state = DecodeState.of(operator(inputs, output_final_state=True, chunk_size=4).final_state)
    with torch.no_grad(), pytest.raises(ValueError, match=POSITIVE):
        take_step(operator, token_at(inputs | {"log_decay": wrong}, 5, torch.float64), state)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_only_active_rows_have_a_log_decay(operator, impl):
    """An idle row's may be anything; an active one is named by its own maximum."""
    inputs = operator.inputs(T=7)
    start = operator(inputs, output_final_state=True, chunk_size=4).final_state.detach()
    token = token_at(inputs, 5, torch.float64)
    anything = {name: x.clone() for name, x in token.items()}
    idle = torch.tensor([0.9, 3.0, torch.inf, torch.nan], dtype=torch.float64)
    anything["log_decay"][0, 0] = idle[:, None] if operator.diagonal else idle
    runs = []
    for given in (token, anything):
        state = DecodeState.of(start)
        out = take_step(operator, given, state, active=torch.tensor([False, True]), impl=impl)
        runs.append([out, *state.fenwick.tensors])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    token["log_decay"][1, 0, 2], token["log_decay"][0] = 0.9, 3.0
    with pytest.raises(ValueError, match=POSITIVE):
        take_step(operator, token, state, active=torch.tensor([False, True]), impl=impl)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_a_log_decay_of_0_minus_infinity_or_nan_is_taken(operator):
    inputs = operator.inputs(T=7)
    for value in (0.0, -0.0, -torch.inf):
        output = operator(inputs | {"log_decay": torch.full_like(inputs["log_decay"], value)}).output
        assert output.isfinite().all()
    assert operator(inputs | {"log_decay": inputs["log_decay"] * torch.nan}).output.isnan().any()


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
@pytest.mark.parametrize("state_dtype, dtype", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_a_state_has_the_dtype_that_its_inputs_return(operator, state_dtype, dtype):
    """One float64 operand makes the state float64; a state of the other dtype would be rounded without a word."""
    kept = operator(operator.inputs(T=5, dtype=state_dtype), chunk_size=4, output_final_state=True).final_state.detach()
    inputs = operator.inputs(T=5, dtype=dtype)
    text = f"must hold {dtype}, as final_state does for these inputs, got {state_dtype}$"
    for impl in ("torch", "reference"):
        with pytest.raises(ValueError, match=f"^initial_state {text}"):
            operator(inputs, chunk_size=4, initial_state=kept, impl=impl)
    decode = DecodeState.of(kept)
    with torch.no_grad(), pytest.raises(ValueError, match=f"^state {text}"):
        take_step(operator, token_at(inputs, 0, dtype), decode)
    mixed = inputs | {"level_scales": inputs["level_scales"].to(state_dtype)}
    if state_dtype == torch.float64:
        again = operator(mixed, chunk_size=4, initial_state=kept, output_final_state=True).final_state
        assert again.blocks.dtype == torch.float64


def test_impl_triton_without_triton_is_one_clear_line():
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from loglinear.ops import log_linear_attention as f\n"
        "x = torch.ones(1, 3, 1, 4)\n"
        "f(x, x, x, None, torch.ones(1, 3, 1, 2), impl='triton')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stderr.strip().splitlines()[-1].startswith("ValueError: impl='triton' needs the package triton")

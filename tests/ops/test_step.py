"""One-token steps in place give what the whole sequence gives, at every step, for rows at positions of their own."""

import pytest
import torch

from loglinear.ops import DecodeState, FenwickState, log_linear_attention_step, log_linear_delta_rule_step
from loglinear.partition import FENWICK
from tests.kernels.interpreter import teach_interpreter
from tests.ops.operators import OPERATORS, by_kernels, parts, relative_error

INTERPRETED = pytest.mark.interpreter


def for_every_operator(names, *cases):
    """Return the mark of a test: its cases for each operator. The kernels of a step have no diagonal gate."""
    return pytest.mark.parametrize(
        f"operator, {names}",
        [
            pytest.param(operator, *case.values, marks=case.marks)
            for operator in OPERATORS
            for case in cases
            if not (operator.diagonal and case.values[0] == "triton")
        ],
        indirect=["operator"],
    )


EVERY_IMPL = for_every_operator(
    "impl", pytest.param("torch"), pytest.param("reference"), pytest.param("triton", marks=INTERPRETED)
)


@pytest.fixture(params=OPERATORS, ids=lambda operator: operator.name)
def operator(request):
    return request.param


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch, request):
    if "triton" in request.node.name:
        pytest.importorskip("triton")
        teach_interpreter(monkeypatch.setattr)


def take_step(operator, token, state, **options):
    """token: the inputs of `operator`, [N, 1, ...]."""
    function = log_linear_delta_rule_step if operator.delta else log_linear_attention_step
    return function(*(token[name][:, 0].detach() for name in operator.names), state, **options)


def sizes(operator, rows, levels, chunk_size, **dims):
    dims = dict(groups=2, heads=4, key_dim=5, value_dim=3) | dims
    return FenwickState.zeros(rows, num_levels=levels, chunk_size=chunk_size, **operator.kind, **dims)


def token_at(inputs, t, dtype):
    return {name: x[:, t : t + 1].detach().to(dtype) for name, x in inputs.items()}


DTYPES = {"torch": torch.float64, "reference": torch.float64, "triton": torch.float32}
FACTOR = 6  # times the error of the whole sequence in float32, by impl="torch"


def budget_of(dtype, operator, inputs, whole, **options):
    """Return the budget of all steps' outputs together; a single one, of few numbers, may have ten times as much."""
    if dtype == torch.float64:
        return 1e-10
    twin = operator({name: x.detach().to(dtype) for name, x in inputs.items()}, impl="torch", **options).output
    return FACTOR * max(relative_error(twin, whole), torch.finfo(dtype).eps)


# Kernels step a few tokens from a state of the torch implementation: the interpreter takes tenths of a second a step.
@for_every_operator(
    "impl, lengths, steps",
    pytest.param("torch", [3, 47, 64], 70),
    pytest.param("triton", [30, 62, 127], 4, marks=INTERPRETED),
    pytest.param("triton", [30, 62, 127, 1023, 4000], 300, marks=pytest.mark.gpu),
)
@pytest.mark.parametrize("levels", [1, 6, 7, 10])
def test_rows_at_different_positions_step_together(operator, impl, lengths, steps, levels):
    """Prompts end before, at and behind a chunk's end; every row crosses chunk ends and merges."""
    C, dtype = 16, DTYPES[impl]
    device = "cuda" if torch.cuda.is_available() and impl == "triton" else "cpu"
    shape = dict(B=1, G=1, H=2, K=20, V=18, L=levels)
    sequences = [operator.inputs(T=length + steps, **shape) for length in lengths]
    ends = [
        operator({n: x[:, :length] for n, x in s.items()}, chunk_size=C, output_final_state=True).final_state
        for s, length in zip(sequences, lengths, strict=True)
    ]
    joined = [None if x[0] is None else torch.cat(x).to(device) for x in zip(*ends, strict=True)]
    state = DecodeState.of(
        FenwickState._make(x if x is None or not x.is_floating_point() else x.to(dtype) for x in joined)
    )
    outputs = []
    for step in range(steps):
        tokens = [token_at(s, n + step, dtype) for s, n in zip(sequences, lengths, strict=True)]
        token = {name: torch.cat([x[name] for x in tokens]).to(device) for name in operator.names}
        outputs.append(take_step(operator, token, state, impl=impl).cpu())
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        whole = operator(sequence, chunk_size=C, output_final_state=True)
        budget = budget_of(dtype, operator, sequence, whole.output)
        actual = torch.stack(outputs, 1)[row]
        for step in range(steps):
            assert relative_error(actual[step], whole.output[0, length + step]) < 10 * budget, step
        assert relative_error(actual, whole.output[0, length:]) < budget
        end = whole.final_state
        held = int(end.position) % C
        for name, part in parts(end).items():
            mine = getattr(state.fenwick, name)[row].cpu()
            if name == "blocks":
                assert relative_error(mine, part[0]) < budget
            elif held:
                assert relative_error(mine[:held], part[0, :held]) < budget, name
        assert int(state.fenwick.position[row]) == int(end.position)


@for_every_operator(
    "impl, first", pytest.param("torch", 0), pytest.param("reference", 0), pytest.param("triton", 14, marks=INTERPRETED)
)
@pytest.mark.parametrize("shape", [(1, 1, 3, 2), (2, 2, 16, 40), (1, 2, 70, 5)], ids=str)
def test_head_dims_scale_and_unit_length(operator, impl, first, shape):
    G, H, K, V = shape
    inputs = operator.inputs(B=1, T=20, G=G, H=H, K=K, V=V, L=8)
    options = dict(scale=0.3) | (dict(l2_normalize=True) if operator.delta else {})
    whole = operator(inputs, chunk_size=16, **options).output
    dtype = DTYPES[impl]
    budget = budget_of(dtype, operator, inputs, whole, **options)
    state = DecodeState.of(sizes(operator, 1, 8, 16, groups=G, heads=H, key_dim=K, value_dim=V, dtype=dtype))
    if first:
        prompt = {name: x[:, :first].detach().to(dtype) for name, x in inputs.items()}
        state.copy_(operator(prompt, chunk_size=16, output_final_state=True, impl="torch", **options).final_state)
    for t in range(first, 20):
        out = take_step(operator, token_at(inputs, t, dtype), state, impl=impl, **options)
        assert relative_error(out, whole[:, t]) < 10 * budget, t


@EVERY_IMPL
def test_rows_that_are_not_active_keep_their_state(operator, impl):
    inputs = operator.inputs(B=2, T=20, G=1, H=1, L=9)
    dtype = DTYPES[impl]
    state = DecodeState.of(sizes(operator, 2, 9, 16, groups=1, heads=1, dtype=dtype))
    prompt = {name: x[:, :14].detach().to(dtype) for name, x in inputs.items()}
    state.copy_(operator(prompt, chunk_size=16, output_final_state=True, impl="torch").final_state)
    whole = operator(inputs, chunk_size=16).output
    budget = budget_of(dtype, operator, inputs, whole)
    seen = [14, 14]
    for step in range(7):
        active = torch.tensor([step % 3 != 0, step % 2 == 0])
        token = {
            name: torch.stack([x[row, seen[row]] for row in range(2)]).detach()[:, None].to(dtype)
            for name, x in inputs.items()
        }
        out = take_step(operator, token, state, active=active, impl=impl)
        for row in range(2):
            if active[row]:
                assert relative_error(out[row], whole[row, seen[row]]) < 10 * budget
                seen[row] += 1
            else:
                assert not out[row].any()
    assert state.fenwick.position.tolist() == seen == [18, 18]


@EVERY_IMPL
def test_a_stepped_state_continues_in_larger_pieces_and_back(operator, impl):
    """Nobody reads the leftovers of a step in the buffers behind the position."""
    inputs = operator.inputs(B=1, T=60, G=1, H=1, L=8)
    dtype = DTYPES[impl]
    whole = operator(inputs, chunk_size=16).output
    budget = budget_of(dtype, operator, inputs, whole)
    state, t = DecodeState.of(sizes(operator, 1, 8, 16, groups=1, heads=1, dtype=dtype)), 0
    for piece in (15, 1, 1, 29, 1, 1, 1, 3, 1):
        part = {name: x[:, t : t + piece].detach().to(dtype) for name, x in inputs.items()}
        if piece == 1:
            out = take_step(operator, part, state, impl=impl)[:, None]
        else:
            out, end = operator(part, chunk_size=16, initial_state=state.fenwick, output_final_state=True, impl="torch")
            state.copy_(end)
        assert relative_error(out, whole[:, t : t + piece]) < 10 * budget, t
        t += piece


def test_no_decay_and_strong_decay(operator):
    for decay in (None, 60.0):
        inputs = operator.inputs(B=1, T=50, L=8, decay=decay or 0.0)
        if decay is None:
            inputs["log_decay"] = torch.zeros_like(inputs["log_decay"])
        whole = operator(inputs, chunk_size=8).output
        state = DecodeState.of(sizes(operator, 1, 8, 8, dtype=torch.float64))
        for t in range(50):
            token = {name: x[:, t : t + 1].detach() for name, x in inputs.items()}
            if decay is None:
                function = log_linear_delta_rule_step if operator.delta else log_linear_attention_step
                parts_ = [None if name == "log_decay" else token[name][:, 0] for name in operator.names]
                out = function(*parts_, state)
            else:
                out = take_step(operator, token, state)
            assert relative_error(out, whole[:, t]) < 1e-9


def test_reordered_rows_are_apart(operator):
    state = DecodeState.of(sizes(operator, 2, 8, 16))
    first, second = (operator.inputs(B=2, T=1, L=8, dtype=torch.float32) for _ in range(2))
    take_step(operator, first, state)
    twins = state.index_select(torch.tensor([0, 0]))
    out = take_step(operator, second, twins)
    assert not torch.equal(out[0], out[1])
    assert state.fenwick.position.tolist() == [1, 1] and twins.fenwick.position.tolist() == [2, 2]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=(2, 2, 6)), r"q must have shape \[N, G, K\] = \[2, 2, 5\], got \[2, 2, 6\]"),
        (dict(v=(3, 4, 3)), r"v must have shape \[N, H, V\] = \[2, 4, 3\]"),
        (dict(level_scales=(2, 4, 11)), "level_scales with L = 11 needs a state of 6 blocks, got one of 3"),
    ],
    ids=str,
)
def test_mistakes_are_named(operator, change, message):
    token = operator.inputs(B=2, T=1, L=8, dtype=torch.float32)
    token |= {name: torch.zeros(shape)[:, None] for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        take_step(operator, token, DecodeState.of(sizes(operator, 2, 8, 16)))


def test_what_a_step_cannot_do_is_said(operator):
    token = operator.inputs(B=2, T=1, L=8, dtype=torch.float32)
    with pytest.raises(ValueError, match="state must be a DecodeState"):
        take_step(operator, token, sizes(operator, 2, 8, 16))
    with pytest.raises(ValueError, match="impl of a step must be one of"):
        take_step(operator, token, DecodeState.of(sizes(operator, 2, 8, 16)), impl="cuda")
    state = DecodeState.of(sizes(operator, 2, 8, 16))
    for dtype in (torch.float32, torch.int64):
        with pytest.raises(ValueError, match=f"active must hold bool, got {dtype}"):
            take_step(operator, token, state, active=torch.ones(2, dtype=dtype))
    with pytest.raises(ValueError, match=r"level_scales must have shape .* got \[2\]"):
        take_step(operator, token | {"level_scales": torch.ones(2, 1)}, state)
    for wrong in (None, state):
        with pytest.raises(ValueError, match="state must be a FenwickState, an operator's final_state"):
            DecodeState.of(wrong)
    with pytest.raises(ValueError, match=r"state.position must have shape \[N\] = \[2\], got \[1\]"):
        state.copy_(sizes(operator, 1, 8, 16))
    assert state.fenwick.position.tolist() == [0, 0]


@pytest.mark.parametrize("change, text", [(dict(key_dim=257), "K = 257, V = 3"), (dict(value_dim=513), "V = 513")])
@pytest.mark.interpreter
@by_kernels
def test_heads_too_wide_for_the_kernels_are_named(operator, change, text):
    pytest.importorskip("triton")
    state = DecodeState.zeros(
        1,
        num_levels=8,
        chunk_size=16,
        **operator.kind,
        **dict(groups=1, heads=1, key_dim=5, value_dim=3) | change,
    )
    K, V = state.fenwick.blocks.shape[3:]
    token = operator.inputs(B=1, T=1, G=1, H=1, K=K, V=V, L=8, dtype=torch.float32)
    with pytest.raises(ValueError, match=f"{text} need impl='torch'"):
        take_step(operator, token, state, impl="triton")


@EVERY_IMPL
def test_a_column_of_a_mask_says_who_is_active(operator, impl):
    """It is a view with a stride."""
    token = operator.inputs(B=2, T=1, G=1, H=1, L=8, dtype=torch.float32)
    state = DecodeState.of(sizes(operator, 2, 8, 16, groups=1, heads=1))
    mask = torch.tensor([[True, False, True], [False, True, False]])
    for column in (0, 1, 1):
        take_step(operator, token, state, active=mask[:, column], impl=impl)
    assert state.fenwick.position.tolist() == [1, 2]


def test_what_an_idle_row_is_given_counts_for_nothing(operator):
    inputs = operator.inputs(B=1, T=3, L=8)
    whole = operator(inputs, chunk_size=4).output
    state = DecodeState.of(sizes(operator, 1, 8, 4, dtype=torch.float64))
    for t in range(3):
        token = token_at(inputs, t, torch.float64)
        nothing = {name: torch.full_like(x, torch.nan) for name, x in token.items()}
        take_step(operator, nothing, state, active=torch.tensor([False]))
        assert relative_error(take_step(operator, token, state), whole[:, t]) < 1e-10


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_states_from_one_position_move_by_themselves(operator, mode):
    dims = dict(num_levels=5, chunk_size=4, groups=2, heads=4, key_dim=5, value_dim=3, **operator.kind)
    token = operator.inputs(T=1, L=5, dtype=torch.float32)
    with mode():
        given = torch.tensor([3, 6])
        once, twice = (DecodeState.zeros(2, position=given, **dims) for _ in range(2))
        raw = FenwickState.zeros(2, position=given, **dims)
        for state in (once, twice, twice):
            take_step(operator, token, state)
    positions = [x.tolist() for x in (given, raw.position, once.fenwick.position, twice.fenwick.position)]
    assert positions == [[3, 6], [3, 6], [4, 7], [5, 8]]


def test_autocast_changes_nothing(operator):
    inputs = operator.inputs(B=1, T=20, L=8, dtype=torch.float32)
    runs = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            head = {name: x[:, :5].detach() for name, x in inputs.items()}
            state = DecodeState.of(operator(head, chunk_size=16, output_final_state=True).final_state)
            outputs = [take_step(operator, token_at(inputs, t, torch.float32), state) for t in range(5, 20)]
        runs.append([*outputs, *(x for x in (*state.fenwick, state.inverse) if x is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_final_state_has_memory_of_its_own(operator):
    inputs = operator.inputs(B=1, T=40, L=8)
    whole = operator(inputs, chunk_size=4).output
    head = {name: x[:, :20].detach() for name, x in inputs.items()}
    state = DecodeState.of(operator(head, chunk_size=4, output_final_state=True).final_state)
    token = token_at(inputs, 20, torch.float64)
    kept = operator(token, chunk_size=4, initial_state=state.fenwick, output_final_state=True).final_state
    for t in range(20, 30):
        take_step(operator, token_at(inputs, t, torch.float64), state)
    rest = {name: x[:, 21:].detach() for name, x in inputs.items()}
    assert relative_error(operator(rest, chunk_size=4, initial_state=kept).output, whole[:, 21:]) < 1e-10


def test_a_state_made_in_inference_mode_serves_outside_of_it(operator):
    inputs = operator.inputs(B=1, T=9, L=8)
    whole = operator(inputs, chunk_size=4).output
    with torch.inference_mode():
        head = {name: x[:, :5].detach() for name, x in inputs.items()}
        state = DecodeState.of(operator(head, chunk_size=4, output_final_state=True).final_state)
        take_step(operator, token_at(inputs, 5, torch.float64), state)
    for t in range(6, 9):
        assert relative_error(take_step(operator, token_at(inputs, t, torch.float64), state), whole[:, t]) < 1e-10


@EVERY_IMPL
@pytest.mark.parametrize("levels", [1, 6, 8])
def test_what_is_not_of_the_past_counts_for_nothing(operator, impl, levels):
    """Blocks that the past does not have, and rows behind its last token, may hold any finite numbers."""
    C, dtype = 16, DTYPES[impl]
    position = torch.tensor([7, 5 * C - 1, 6 * C + 3])
    shape = dict(B=3, G=1, H=1, L=levels)
    dims = dict(groups=1, heads=1, dtype=dtype)
    clean, noise = (
        [torch.randn_like(x.double()).to(dtype) for x in sizes(operator, 3, levels, C, **dims)[1:5]] for _ in range(2)
    )
    for some in (clean, noise):
        some[1] = some[1] / some[1].norm(dim=-1, keepdim=True)
        some[3] = -some[3].abs()
    beta = [torch.rand(3, C, 1).to(dtype) if operator.delta else None for _ in range(2)]
    M = clean[0].shape[1]
    held = torch.tensor([[FENWICK.has_block(int(p) // C, m, M, C) for m in range(M)] for p in position]).view(
        3, M, 1, 1, 1
    )
    real = torch.arange(C) < (position % C)[:, None]
    states = []
    for other in (0, 1):
        blocks = torch.where(held, clean[0], noise[0] * other)
        pairs = zip([*clean[1:], beta[0]], [*noise[1:], beta[1]], strict=True)
        rows = [
            None if a is None else torch.where(real.view(3, C, *[1] * (a.dim() - 2)), a, b * other) for a, b in pairs
        ]
        states.append(FenwickState(position, blocks, *rows))
    token = {name: x.detach().to(dtype) for name, x in operator.inputs(T=2, **shape).items()}
    results = []
    for state in states:
        output, final = operator(token, chunk_size=C, initial_state=state, impl=impl, output_final_state=True)
        decode = DecodeState.of(state)
        steps = [take_step(operator, {n: x[:, t : t + 1] for n, x in token.items()}, decode, impl=impl) for t in (0, 1)]
        later = operator(token, chunk_size=C, initial_state=decode.fenwick, impl="reference").output
        results.append([output, *parts(final).values(), *steps, later])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@EVERY_IMPL
@pytest.mark.parametrize("levels", [1, 6, 8])
def test_a_prefix_that_is_not_of_the_past_counts_for_nothing(operator, impl, levels):
    """Neither once new tokens have made the first one."""
    C, dtype = 16, DTYPES[impl]
    dims = dict(groups=1, heads=1, dtype=dtype)
    clean = sizes(operator, 2, levels, C, **dims)._replace(position=torch.tensor([0, 7]))
    blocks = torch.randn_like(clean.blocks)
    token = {name: x.detach().to(dtype) for name, x in operator.inputs(B=2, T=5 * C, G=1, H=1, L=levels).items()}
    results = []
    for state in (clean, clean._replace(blocks=blocks)):
        output, final = operator(token, chunk_size=C, initial_state=state, impl=impl, output_final_state=True)
        results.append([output, *parts(final).values()])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)

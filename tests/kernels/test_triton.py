"""The Triton kernels under the interpreter, where there is no GPU: every kernel, against float64, with every gradient.

The interpreter multiplies in float32, so that the algorithm is checked to float32's rounding. What the compiler makes
of the kernels is checked on a GPU (test_triton_gpu.py).
"""

import pytest
import torch

from loglinear.ops import FenwickState
from loglinear.partition import FENWICK
from tests.kernels.emulated import EMULATED
from tests.kernels.emulation import (
    differentiate,
    errors,
    excesses,
    leaf_state,
    make,
    operator_of,
    repeat_keys,
    run_chunks,
    teach_rounding,
)
from tests.kernels.interpreter import teach_interpreter
from tests.ops.operators import OPERATORS, excess, gradients, parts, random_loss, relative_error

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter
# times the error of impl="torch" in float32 in the same test: at most 4.6 with numpy's products for any processor
FACTOR = 6
EPS = torch.finfo(torch.float32).eps


def run(inputs, impl, dtype, *, initial_state=None, weights=None, final=True, **options):
    """Output, parts of the final state and every gradient by name; the weights of the loss; the final position."""
    x = {n: t.detach().to(dtype).requires_grad_() for n, t in inputs.items()}
    state = leaf_state(initial_state, dtype)
    out = operator_of(inputs)(x, impl=impl, initial_state=state, output_final_state=final, **options)
    results = {"output": out.output} | (parts(out.final_state) if final else {})
    weights = weights or random_loss(*results.values())
    leaves = x | ({} if state is None else {f"state's {name}": part for name, part in parts(state).items()})
    grads = gradients(list(results.values()), tuple(w.to(dtype) for w in weights), list(leaves.values()))
    grads = {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    if initial_state is not None:  # blocks that the position has no bit for are 0 by contract, and have no gradient
        name = "gradient of state's blocks"
        grads[name] = torch.where(initial_state.blocks != 0, grads[name], 0.0)
    found = {name: x.detach().double() for name, x in (results | grads).items()}
    return found, weights, out.final_state.position if final else None


def compare(inputs, *, chunk_size=16, rounded=None, **options):
    """Output, final state and all gradients of impl="triton" in float32: how much farther from float64 they are than
    those of impl="torch" in float32.

    Without states the kernels choose their chunk; with them it is chunk_size. rounded: an input whose rounding can move
    the results farther than the twin's roundings happen to; how far one moves them counts as the twin's error then."""
    options |= dict(chunk_size=chunk_size)
    exact, weights, position = run(inputs, "torch", torch.float64, **options)
    actual, _, own_position = run(inputs, "triton", torch.float32, weights=weights, **options)
    twin, *_ = run(inputs, "torch", torch.float32, weights=weights, **options)
    assert position is None or torch.equal(own_position, position)
    moved = exact
    if rounded is not None:
        more = inputs[rounded].detach().double() * (1 + EPS)
        moved, *_ = run(inputs | {rounded: more}, "torch", torch.float64, weights=weights, **options)
    # A decay that nothing crosses has gradient 0, the difference of two sums: its error is measured by the others'.
    flow = float(exact["gradient of log_decay"].norm())
    for name, e in exact.items():
        size = max(float((moved[name] - e).norm()) / EPS, flow if "log_decay" in name else 0.0)
        times = excess(actual[name], twin[name].float(), e, size)
        assert times <= FACTOR, (name, times, relative_error(actual[name], e))


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    teach_interpreter(monkeypatch.setattr)


@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 65])
def test_any_length(operator, T):
    compare(operator.inputs(B=2, T=T, G=1, H=2, K=16, V=16, L=9))


@pytest.mark.parametrize(("T", "levels"), [(16, 7), (11, 7), (16, 1)])
def test_rows_of_one_chunk_need_no_sweeps(T, levels, monkeypatch):
    """The output, the final state and the gradients are those with sweeps, which are not started."""
    from loglinear.kernels.triton.scalar_gate import sweep

    inputs = OPERATORS[0].inputs(B=3, T=T, G=1, H=2, K=8, V=8, L=levels)
    x = {name: tensor.detach().float().requires_grad_() for name, tensor in inputs.items()}

    def call():
        out = OPERATORS[0](x, impl="triton", chunk_size=16, output_final_state=True)
        results = [out.output, out.final_state.blocks]
        loss = sum(result.square().sum() for result in results)
        return [*results, *torch.autograd.grad(loss, list(x.values()))]

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "is_merged", lambda call: False)
        expected = call()
    monkeypatch.delattr(sweep, "up_sweep_kernel")
    monkeypatch.delattr(sweep, "down_sweep_kernel")
    assert all(map(torch.equal, call(), expected))


@pytest.mark.parametrize("levels", [1, 2, 5, 6, 7, 20, 40])
def test_any_number_of_levels(operator, levels):
    compare(operator.inputs(B=1, T=150, G=1, H=1, K=8, V=8, L=levels))


@pytest.mark.parametrize("ends", [[0, 0, 20], [0, 20, 20], [0, 0, 0]])
@pytest.mark.parametrize("positions", [(65 * 16, 3 * 16), (65 * 16, 67 * 16)], ids=str)
def test_a_continued_sequence_without_new_tokens(operator, positions, ends):
    """It hands its blocks on, and their gradients; 65 chunks, so that many readers are gathered in runs."""
    states = []
    for position in positions:
        first = operator.inputs(B=1, T=position, G=1, H=1, K=4, V=4, L=8)
        states.append(operator(first, chunk_size=16, output_final_state=True).final_state)
    state = type(states[0])(*(None if x[0] is None else torch.cat(x).detach() for x in zip(*states, strict=True)))
    T = max(ends[-1], 1)
    cu_seqlens = torch.tensor([*ends[:-1], T])
    compare(operator.inputs(B=1, T=T, G=1, H=1, K=4, V=4, L=8), initial_state=state, cu_seqlens=cu_seqlens)


def test_full_resets_leave_the_same_state(operator):
    inputs = operator.inputs(B=1, T=21, G=1, H=1, K=4, V=4, L=7, dtype=torch.float32)
    with torch.no_grad():
        inputs["log_decay"][0, 18] = -torch.inf
    states = [
        operator(inputs, impl=impl, chunk_size=16, output_final_state=True).final_state for impl in ("torch", "triton")
    ]
    assert torch.equal(states[0].log_decay, states[1].log_decay)
    torch.testing.assert_close(states[1].blocks, states[0].blocks)


@pytest.mark.parametrize("shape", [(1, 3, 5, 3), (2, 4, 16, 40), (2, 2, 24, 16), (1, 4, 48, 20)], ids=str)
def test_groups_and_head_dims(operator, shape):
    G, H, K, V = shape
    compare(operator.inputs(B=1, T=70, G=G, H=H, K=K, V=V, L=8), scale=0.7)


@pytest.mark.parametrize("decay", [0.0, 3.0, 40.0])
def test_decays_from_none_to_strong(operator, decay):
    """The exponents' own rounding grows with the sum of a chunk's decays: it is what the factor's 4.6 are from."""
    compare(operator.inputs(B=1, T=140, G=1, H=1, K=16, V=16, L=9, decay=decay))


@pytest.mark.parametrize("levels", [1, 7, 20])
@pytest.mark.parametrize("ends", [[0, 1, 40, 40, 72, 200], [*range(0, 200, 23), *[200] * 5]])
def test_packed_sequences(operator, levels, ends):
    cu_seqlens = torch.tensor(ends)
    compare(operator.inputs(B=1, T=200, G=1, H=1, K=8, V=8, L=levels), cu_seqlens=cu_seqlens)


def test_narrow_integers_as_cu_seqlens(operator):
    inputs = operator.inputs(B=1, T=250, G=1, H=1, K=4, V=4, L=9, dtype=torch.float32)
    ends = torch.tensor([0, 200, 250])
    outputs = [operator(inputs, impl="triton", cu_seqlens=x).output for x in (ends, ends.to(torch.uint8))]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("levels", "start"), [(1, 37), (1, 100), (6, 1), (6, 100), (8, 16), (8, 37), (20, 16), (20, 100)]
)
def test_continues_a_state(operator, levels, start):
    first = operator.inputs(B=1, T=start, G=1, H=1, K=8, V=8, L=levels)
    state = operator(first, chunk_size=16, output_final_state=True).final_state
    state = type(state)(*(None if x is None else x.detach() for x in state))
    compare(operator.inputs(B=1, T=70, G=1, H=1, K=8, V=8, L=levels), initial_state=state)


def test_empty_states_at_different_positions(operator):
    start = FenwickState.zeros(
        3,
        num_levels=8,
        chunk_size=16,
        groups=1,
        heads=2,
        key_dim=8,
        value_dim=8,
        delta_rule=operator.delta,
        position=torch.tensor([5, 48, 255]),
        dtype=torch.float64,
    )
    compare(operator.inputs(B=3, T=40, G=1, H=2, K=8, V=8, L=8), initial_state=start)


def test_continues_packed_states_at_different_positions(operator):
    lengths = [1, 30, 100]
    states = []
    for length in lengths:
        first = operator.inputs(B=1, T=length, G=1, H=2, K=8, V=8, L=8)
        states.append(operator(first, chunk_size=16, output_final_state=True).final_state)
    state = type(states[0])(*(None if x[0] is None else torch.cat(x).detach() for x in zip(*states, strict=True)))
    cu_seqlens = torch.tensor([0, 50, 50, 90])
    compare(operator.inputs(B=1, T=90, G=1, H=2, K=8, V=8, L=8), initial_state=state, cu_seqlens=cu_seqlens)


def test_says_what_it_cannot_do(operator):
    inputs = operator.inputs(B=1, T=5, G=1, H=1, K=8, V=8, L=3)
    with pytest.raises(ValueError, match="float64 needs impl='torch'"):
        operator(inputs, impl="triton")
    singles = {name: x.float() for name, x in inputs.items()}
    with pytest.raises(ValueError, match="a state with chunk_size 8 needs impl='torch'"):
        operator(singles, impl="triton", chunk_size=8, output_final_state=True)
    wide = {n: x.float() for n, x in operator.inputs(B=1, T=5, G=1, H=1, K=300, V=8, L=3).items()}
    with pytest.raises(ValueError, match="head dims K = 300, V = 8 need impl='torch'"):
        operator(wide, impl="triton")
    with pytest.raises(ValueError, match="interpreter cannot multiply bfloat16"):
        operator({name: x.bfloat16() for name, x in inputs.items()}, impl="triton")


def test_is_one_node_for_torch(operator):
    from loglinear.kernels.triton import chunkwise

    x = operator.inputs(B=1, T=20, G=1, H=1, K=8, V=8, L=6, dtype=torch.float32)
    tensors = [x.get(name) for name in OPERATORS[1].names]
    torch.library.opcheck(chunkwise, (*tensors, None, None, None, 1.0, 16, True, FENWICK.numbers))
    compiled = torch.compile(lambda x: operator(x, impl="triton").output, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), operator(x, impl="triton").output)


@pytest.mark.parametrize(("T", "chunk_size"), [(245, 16), (260, 128)])
def test_what_was_not_written_is_not_read(operator, T, chunk_size, monkeypatch):
    """The last of 16 chunks is unfinished, at the end of a run; the last of chunks of 128 has less than one half."""

    def poisoned(empty):
        def full_of_nan(*args, **kwargs):
            x = empty(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return full_of_nan

    inputs = make(1, T, 1, 1, 8, 8, 9, torch.float32, device="cpu", delta=operator.delta)
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    found = excesses(inputs, chunk_size)
    assert all(times <= FACTOR for times in found.values()), found


@pytest.mark.parametrize("name", ["output", "blocks"])
def test_a_loss_of_the_output_or_of_the_state_alone(operator, name):
    """Two whole chunks and an unfinished one without tokens, which has a place for the state's sake."""
    inputs = operator.inputs(B=2, T=32, G=1, H=1, K=8, V=8, L=7)
    grads = []
    for impl, dtype in (("triton", torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
        x = {n: t.detach().to(dtype).requires_grad_() for n, t in inputs.items()}
        out = operator(x, impl=impl, chunk_size=16, output_final_state=True)
        result = out.output if name == "output" else out.final_state.blocks
        grads.append(torch.autograd.grad(result.square().sum(), list(x.values()), materialize_grads=True))
    for actual, twin, exact in zip(*grads, strict=True):
        assert excess(actual, twin, exact, size=1e-3) <= FACTOR


def test_two_runs_give_the_same_bits(operator):
    inputs = operator.inputs(B=1, T=70, G=1, H=2, K=8, V=8, L=8, dtype=torch.float32)

    def run():
        out = operator(inputs, impl="triton").output
        return [out, *torch.autograd.grad(out.square().sum(), list(inputs.values()))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_slabs_of_heads_change_nothing(operator, monkeypatch):
    from loglinear.kernels.triton.delta_rule import backward as delta_backward
    from loglinear.kernels.triton.inputs import slabs
    from loglinear.kernels.triton.scalar_gate import backward

    assert slabs(10, 2, 6, 100, 6000) == [slice(0, 6)]
    assert slabs(10, 6, 6, 100, 5000) == [slice(0, 3), slice(3, 6)]
    assert slabs(10, 2, 6, 100, 4000) == [slice(0, 3), slice(3, 6)]
    assert slabs(10, 1, 6, 100, 4000) == [slice(0, 3), slice(3, 6)]
    assert slabs(40, 1, 6, 100, 4000) == [slice(h, h + 1) for h in range(6)]
    monkeypatch.setattr(backward, "SLAB_BYTES", 4000)
    monkeypatch.setattr(delta_backward, "SLAB_BYTES", 4000)
    for groups in (1, 2):
        compare(operator.inputs(B=1, T=40, G=groups, H=2, K=8, V=8, L=8))


@pytest.mark.parametrize("float32_scales", [True, False])
def test_bfloat16_products(monkeypatch, operator, float32_scales):
    """The branches for bfloat16, at no more than the errors that its rounding makes."""
    teach_rounding(monkeypatch.setattr)
    options = dict(device="cpu", float32_scales=float32_scales, delta=operator.delta)
    found = errors(make(1, 300, 1, 2, 64, 64, 9, torch.bfloat16, **options))
    assert all(found[name] <= limit for name, limit in EMULATED[operator.name][torch.bfloat16].items()), found


def test_delta_rule_that_reflects():
    """No decay, beta 2 (the eigenvalue of a key is -1), queries and keys of any length."""
    operator = OPERATORS[1]
    inputs = operator.inputs(B=1, T=150, G=1, H=2, K=16, V=16, L=9, dtype=torch.float32)
    inputs |= {"k": (3 * inputs["k"]).detach().requires_grad_()}
    inputs["beta"] = torch.full_like(inputs["beta"], 2.0).requires_grad_()
    del inputs["log_decay"]
    doubles = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    weight = torch.randn(1, 150, 2, 16)

    def results(impl, x):
        def function(x):
            return operator({**x, "log_decay": None}, impl=impl, l2_normalize=True).output

        return differentiate(x, function, weight)[0]

    for a, t, e in zip(results("triton", inputs), results("torch", inputs), results("reference", doubles), strict=True):
        assert excess(a, t, e) <= FACTOR


@pytest.mark.parametrize(
    ("T", "levels"),
    [(300, 1), (300, 2), (300, 6), (300, 7), (300, 8), (300, 9), (300, 12), (190, 1), (190, 8), (190, 12)],
)
def test_chunks_of_128(operator, T, levels):
    """Chunks of 128, which only bfloat16 chooses, in float32; the last one has less or more than one half."""
    heads = 2 if levels == 9 else 1
    inputs = make(1, T, 1, heads, 16, 16, levels, torch.float32, device="cpu", delta=operator.delta)
    found = excesses(inputs, 128)
    assert all(times <= FACTOR for times in found.values()), found


def test_chunks_of_128_of_wide_heads(operator):
    """Several tiles of V, a last tile of K and of V that is not full, and heads that share queries and keys."""
    inputs = make(1, 300, 1, 2, 80, 144, 9, torch.float32, device="cpu", delta=operator.delta)
    found = excesses(inputs, 128)
    assert all(times <= FACTOR for times in found.values()), found


def test_gradients_have_the_dtype_of_their_inputs(operator):
    """float16 queries round nothing of the keys' gradient, and overflow nothing."""
    inputs = make(1, 70, 1, 1, 8, 8, 8, torch.float32, device="cpu", delta=operator.delta)
    inputs["q"] = inputs["q"].detach().half().requires_grad_()
    exact = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    weight = 1e5 * torch.randn(1, 70, 1, 8)
    grads = torch.autograd.grad(operator(inputs, impl="triton").output, list(inputs.values()), weight)
    twins = torch.autograd.grad(operator(inputs, impl="torch").output, list(inputs.values()), weight)
    expected = torch.autograd.grad(operator(exact).output, list(exact.values()), weight.double())
    for (name, x), a, t, e in zip(inputs.items(), grads, twins, expected, strict=True):
        assert a.dtype == x.dtype
        assert name == "q" or excess(a, t, e) <= FACTOR, name


@pytest.mark.parametrize("keys", ["one", "eight"])
def test_reflections(keys):
    """beta = 2, the largest, turns what a key holds around; where a key comes again without decay, for ever."""
    inputs = repeat_keys(make(1, 150, 1, 1, 16, 8, 9, torch.float32, device="cpu", delta=True), keys, decay=0.0)
    with torch.no_grad():
        inputs["beta"].fill_(2.0)
    compare(inputs, rounded="beta")


def test_float16_reflections(monkeypatch):
    """Single tf32 products, which cut digits off, would make each chunk's transition longer by 27 % here, and an output
    that is wrong by its double; 0.17 is what the chunk's own reads are off (single products of the inverse)."""
    teach_rounding(monkeypatch.setattr)
    inputs = repeat_keys(make(1, 700, 1, 1, 64, 16, 11, torch.float16, device="cpu", delta=True), "one", decay=0.0)
    with torch.no_grad():
        inputs["beta"].fill_(2.0)
    exact = {n: x.detach().double() for n, x in inputs.items()}
    assert relative_error(run_chunks(inputs, 0), OPERATORS[1](exact, impl="torch").output) < 0.2


@pytest.mark.parametrize("chunk_size", [0, 128])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_lambda_of_levels_that_a_token_does_not_read_does_not_matter(operator, value, chunk_size):
    inputs = make(1, 200, 1, 1, 8, 8, 12, torch.float32, device="cpu", delta=operator.delta)
    clean = {n: x.detach().clone().requires_grad_() for n, x in inputs.items()}
    reads = torch.tensor([[level == 0 or (t >> (level - 1)) & 1 for level in range(12)] for t in range(200)]).bool()
    with torch.no_grad():
        inputs["level_scales"][0, ~reads[:, None]] = value
    found = excesses(inputs, chunk_size, clean)
    assert all(times <= FACTOR for times in found.values()), found

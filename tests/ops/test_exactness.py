"""The fast path equals the definitions, forward and every gradient, in float64 at awkward sizes."""

import pytest
import torch

from loglinear.kernels.torch import chunks
from tests.ops.operators import OPERATORS, gradients, parts, random_loss, relative_error

EXACT = 1e-10

pytestmark = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)

# T, chunk_size, L, G: chunk borders, powers of two and their neighbours; full levels, capped levels, levels that do
# not even fill a chunk, and the linear model
SIZES = [
    (1, 4, 3, 2), (3, 4, 9, 1), (4, 4, 9, 4), (5, 4, 9, 1), (31, 4, 9, 2), (32, 4, 9, 2), (33, 4, 9, 2),
    (63, 8, 7, 4), (64, 8, 7, 1), (65, 8, 20, 2), (37, 4, 1, 2), (45, 4, 2, 2), (45, 4, 4, 1), (45, 4, 5, 2),
    (29, 1, 4, 2), (65, 2, 12, 1), (70, 64, 9, 2), (40, 16, 3, 4),
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_chunked_matches_recurrent_with_every_gradient(operator, size):
    T, chunk_size, L, G = size
    inputs = operator.inputs(T=T, L=L, G=G)
    leaves = list(inputs.values())
    options = dict(chunk_size=chunk_size, output_final_state=True)
    fast, slow = (operator(inputs, impl=impl, **options) for impl in ("torch", "reference"))
    assert relative_error(fast.output, slow.output) < EXACT
    fast_parts, slow_parts = parts(fast.final_state), parts(slow.final_state)
    assert torch.equal(fast.final_state.position, slow.final_state.position)
    for name, part in fast_parts.items():
        assert torch.allclose(part, slow_parts[name], rtol=EXACT, atol=EXACT), name
    weights = random_loss(fast.output, *fast_parts.values())
    actual = gradients([fast.output, *fast_parts.values()], weights, leaves)
    expected = gradients([slow.output, *slow_parts.values()], weights, leaves)
    for name, a, e in zip(inputs, actual, expected, strict=True):
        assert relative_error(a, e) < EXACT or float((a - e).norm()) < EXACT, name


@pytest.mark.parametrize("levels", [1, 3, 6, 9])
@pytest.mark.parametrize("T", [1, 2, 17, 40])
def test_recurrent_matches_dense(operator, T, levels):
    inputs = operator.inputs(T=T, L=levels)
    assert relative_error(operator(inputs, impl="reference").output, operator.dense(inputs)) < EXACT


@pytest.mark.parametrize("levels, chunk_size", [(6, 2), (2, 2), (1, 4)])
def test_gradcheck(operator, levels, chunk_size):
    inputs = operator.inputs(B=1, T=7, G=1, H=2, K=2, V=2, L=levels)
    cu_seqlens = torch.tensor([0, 2, 7])
    state = operator(operator.inputs(B=1, T=9, G=1, H=2, K=2, V=2, L=levels), chunk_size=chunk_size,
                     cu_seqlens=torch.tensor([0, 3, 9]), output_final_state=True).final_state  # fmt: skip
    leaves = [part.detach().requires_grad_() for part in parts(state).values()]

    def run(*tensors):
        given = dict(zip(inputs, tensors[: len(inputs)], strict=True))
        old = state._replace(**dict(zip(parts(state), tensors[len(inputs) :], strict=True)))
        out = operator(given, chunk_size=chunk_size, cu_seqlens=cu_seqlens, initial_state=old, output_final_state=True)
        return out.output, *parts(out.final_state).values()

    # finite differences must not touch the places of a buffer that hold no token: they are zero by definition
    held = state.position % chunk_size
    used = torch.arange(chunk_size)[None] < held[:, None]

    def masked(*tensors):
        real = [
            torch.where(used.view(*used.shape, *[1] * (x.dim() - 2)), x, 0.0) if name != "blocks" else x
            for name, x in zip(parts(state), tensors[len(inputs) :], strict=True)
        ]
        active = (state.position // chunk_size)[:, None] >> torch.arange(state.blocks.shape[1]) & 1
        active[:, -1] = (state.position // chunk_size) >> (state.blocks.shape[1] - 1) > 0
        real[0] = real[0] * active[..., None, None, None]
        return run(*tensors[: len(inputs)], *real)

    assert torch.autograd.gradcheck(masked, (*inputs.values(), *leaves), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 2, 8, 64])
def test_result_does_not_depend_on_the_chunk_size(operator, chunk_size):
    inputs = operator.inputs(T=50)
    assert relative_error(operator(inputs, chunk_size=chunk_size).output, operator.dense(inputs)) < EXACT


def test_scale_multiplies_the_queries(operator):
    inputs = operator.inputs()
    scaled = operator({**inputs, "q": inputs["q"] * 0.25}).output
    assert relative_error(operator(inputs, scale=0.25).output, scaled) < EXACT


def test_no_decay_equals_zero_log_decay(operator):
    inputs = operator.inputs()
    inputs["log_decay"] = torch.zeros_like(inputs["log_decay"])
    without = operator({**inputs, "log_decay": None})
    zeros = operator(inputs).output
    # Without a log decay the gate is scalar, whose matrix products round otherwise than those of a diagonal gate.
    assert relative_error(without.output, zeros) < EXACT if operator.diagonal else torch.equal(without.output, zeros)


@pytest.mark.parametrize("levels", [9, 4])
def test_decays_from_none_to_a_full_reset(operator, levels):
    """One head never forgets, one forgets within ten tokens, one is wiped now and then, one at every token."""
    inputs = operator.inputs(T=45, L=levels)
    with torch.no_grad():
        decay = torch.zeros(2, 45, 4, dtype=torch.float64)
        decay[:, :, 1] = -0.4
        decay[:, ::7, 2] = -float("inf")
        decay[:, :, 3] = -1000.0
        if operator.diagonal:  # channels of the same head, too, forget at different rates
            decay = torch.stack([decay.roll(channel, 2) for channel in range(5)], -1)
    given = {**inputs, "log_decay": decay}
    fast, slow = (operator(given, chunk_size=4, impl=impl).output for impl in ("torch", "reference"))
    assert relative_error(fast, slow) < EXACT
    leaves = [x for name, x in inputs.items() if name != "log_decay"]
    weights = random_loss(fast)
    for a, e in zip(gradients([fast], weights, leaves), gradients([slow], weights, leaves), strict=True):
        assert relative_error(a, e) < EXACT


def test_the_future_does_not_leak_into_the_past(operator):
    inputs = operator.inputs(T=40)
    changed = {name: x.detach().clone() for name, x in inputs.items()}
    for x in changed.values():
        x[:, 23:] = x[:, 23:] * 0.5
    before, after = (operator(x, chunk_size=4).output[:, :23] for x in (inputs, changed))
    assert torch.equal(before, after)


def test_two_runs_give_the_same_bits(operator):
    inputs = operator.inputs(T=100, dtype=torch.float32)
    leaves = list(inputs.values())
    runs = []
    weights = None
    for _ in range(2):
        output = operator(inputs, chunk_size=8).output
        weights = weights or random_loss(output)
        runs.append([output, *gradients([output], weights, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_every_result_is_written(operator):
    """With fresh memory filled with NaN, nothing unwritten can pass for a result."""
    inputs = operator.inputs(T=45, L=4)
    expected = operator.dense(inputs)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        result = operator(inputs, chunk_size=4, output_final_state=True)
        grads = torch.autograd.grad(result.output.sum(), list(inputs.values()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert relative_error(result.output, expected) < EXACT
    assert all(bool(x.isfinite().all()) for x in [*grads, *parts(result.final_state).values()])


def test_strided_inputs(operator):
    inputs = operator.inputs(T=20)
    strided = {name: x.detach().transpose(0, 1).contiguous().transpose(0, 1) for name, x in inputs.items()}
    assert torch.equal(operator(strided, chunk_size=4).output, operator(inputs, chunk_size=4).output)


@pytest.mark.parametrize("G, heads_per_slab", [(6, 1), (6, 4), (2, 1), (2, 2), (2, 3), (1, 4), (1, 6), (3, 5)])
def test_slabs_of_heads_change_nothing(operator, G, heads_per_slab, monkeypatch):
    inputs = operator.inputs(T=30, G=G, H=6)
    leaves = list(inputs.values())

    def run(weights=None):
        out = operator(inputs, chunk_size=4, output_final_state=True)
        tensors = [out.output, *parts(out.final_state).values()]
        weights = weights or random_loss(*tensors)
        return tensors + gradients(tensors, weights, leaves), weights

    whole, weights = run()
    bytes_per_head = 9 * 4 * 5 * 8  # chunks with the empty one, places, key width, float64
    monkeypatch.setattr(chunks, "SLAB_BYTES", {"cpu": heads_per_slab * bytes_per_head})
    for cut, expected in zip(run(weights)[0], whole, strict=True):
        assert torch.allclose(cut, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("levels, chunk_size", [(66, 1), (80, 64)])
def test_more_levels_than_any_sequence_can_use(operator, levels, chunk_size):
    inputs = operator.inputs(T=70, L=levels)
    state = operator(
        {n: x[:, :63] for n, x in inputs.items()}, chunk_size=chunk_size, output_final_state=True
    ).final_state
    outputs = []
    for t in range(63, 70):
        token = {name: x[:, t : t + 1] for name, x in inputs.items()}
        out = operator(token, chunk_size=chunk_size, initial_state=state, output_final_state=True)
        outputs.append(out.output)
        state = out.final_state
    assert relative_error(torch.cat(outputs, 1), operator.dense(inputs)[:, 63:]) < EXACT

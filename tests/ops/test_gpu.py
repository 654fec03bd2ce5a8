"""The same operators on a CUDA device: exact in float64, within the float32 budget, the same bits twice."""

import subprocess
import sys

import pytest
import torch

from loglinear.ops import DecodeState, announcement, log_linear_attention_step, log_linear_delta_rule_step
from loglinear.partition import FENWICK, Partition
from tests.ops.operators import OPERATORS, by_kernels, gradients, parts, random_loss, relative_error
from tests.waiting import waiting_is_an_error

pytestmark = pytest.mark.gpu


@pytest.fixture(params=OPERATORS, ids=lambda operator: operator.name)
def operator(request):
    return request.param


def run(operator, inputs, weights=None, **options):
    """Output, state and every gradient of one call, and the loss weights used."""
    out = operator(inputs, output_final_state=True, **options)
    results = [out.output, *parts(out.final_state).values()]
    weights = weights or random_loss(*results)
    return [*results, *gradients(results, weights, list(inputs.values()))], weights


def on(device, inputs, dtype=None):
    return {name: x.detach().to(device, dtype).requires_grad_() for name, x in inputs.items()}


@pytest.mark.parametrize("levels", [1, 4, 12, 40])
@pytest.mark.parametrize("ends", [None, [0, 100, 100, 777, 1000]], ids=["dense", "packed"])
@pytest.mark.parametrize("partition", [FENWICK, Partition(4), Partition(16, 16), Partition(4, 16, 64)], ids=str)
def test_gpu_matches_cpu_in_float64(operator, levels, ends, partition):
    inputs = operator.inputs(B=1, T=1000, K=16, V=24, L=levels)
    options = dict(cu_seqlens=None if ends is None else torch.tensor(ends), chunk_size=16, partition=partition)
    expected, weights = run(operator, inputs, **options)
    actual, _ = run(operator, on("cuda", inputs), tuple(w.cuda() for w in weights), **options)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a.cpu(), e) < 1e-10 or float((a.cpu() - e).norm()) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_output_error(operator, dtype):
    rounded = on("cuda", operator.inputs(T=3000, K=64, V=64, L=13), dtype)
    exact = operator(on("cuda", rounded, torch.float64)).output
    error = relative_error(operator(rounded, impl="torch").output, exact)
    assert error < 1.02 * relative_error(exact.to(dtype), exact) + 6e-7


@by_kernels
def test_auto_runs_another_partition_in_the_kernels(operator, caplog, monkeypatch):
    monkeypatch.setattr(announcement, "_announced", set())
    with caplog.at_level("INFO", logger=announcement.__name__):
        operator(on("cuda", operator.inputs(T=100), torch.float32), partition=Partition(4))
    assert "runs with impl='triton'" in caplog.text


def test_a_compiled_call_of_another_partition(operator):
    """Inductor around the operator, in one graph: output and gradients of the eager call."""
    inputs = on("cuda", operator.inputs(T=500, K=16, V=16, L=20), torch.float32)

    def call(*tensors):
        return operator(dict(zip(inputs, tensors, strict=True)), partition=Partition(16, 16)).output

    torch._dynamo.reset()
    expected = call(*inputs.values())
    weights = random_loss(expected)
    results = []
    for output in (torch.compile(call, fullgraph=True)(*inputs.values()), expected):
        results.append([output, *gradients([output], weights, list(inputs.values()))])
    for a, e in zip(*results, strict=True):
        assert relative_error(a, e) < 1e-6


def test_two_gpu_runs_give_the_same_bits(operator):
    inputs = on("cuda", operator.inputs(T=3000, K=32, V=32, L=8), torch.float32)
    first, weights = run(operator, inputs)
    second, _ = run(operator, inputs, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gpu_prefill_and_decode_equal_the_full_forward(operator):
    inputs = on("cuda", operator.inputs(T=100, L=9))
    state = operator({n: x[:, :61] for n, x in inputs.items()}, chunk_size=8, output_final_state=True).final_state
    outputs = []
    for t in range(61, 100):
        token = {name: x[:, t : t + 1] for name, x in inputs.items()}
        out = operator(token, chunk_size=8, initial_state=state, output_final_state=True)
        outputs.append(out.output)
        state = out.final_state
    assert relative_error(torch.cat(outputs, 1), operator(inputs, chunk_size=8).output[:, 61:]) < 1e-10


WIDE = (2, 2, 192, 384)  # the paper's Gated DeltaNet; the scalar gate's kernels take V up to 256
# Of a step's output: what rounding the inputs and the output costs, and the prefill's kernels that made the state.
STEP_BUDGET = {
    "scalar_gate": {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 3.5e-3},
    "delta_rule": {torch.float32: 3e-6, torch.float16: 2.5e-3, torch.bfloat16: 7e-3},
}


@pytest.mark.parametrize("chunk_size", [16, 128])
@by_kernels
def test_steps_with_the_smallest_and_the_largest_chunk(operator, chunk_size):
    inputs = on("cuda", operator.inputs(B=2, T=300, G=1, H=2, K=128, V=80, L=10, decay=0.05), torch.float32)
    exact = operator({n: x.double() for n, x in inputs.items()}, impl="torch").output[:, 100:]
    head = {n: x[:, :100].detach() for n, x in inputs.items()}
    state = DecodeState.of(operator(head, chunk_size=chunk_size, output_final_state=True, impl="torch").final_state)
    function = log_linear_delta_rule_step if operator.delta else log_linear_attention_step
    outputs = torch.stack(
        [function(*(inputs[n][:, 100 + t].detach() for n in operator.names), state, impl="triton") for t in range(200)],
        1,
    )
    assert max(relative_error(outputs[:, t], exact[:, t]) for t in range(200)) < 3e-5
    assert relative_error(outputs, exact) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 6, 128, 64), WIDE, (1, 2, 5, 3), (2, 2, 256, 256), (3, 3, 64, 80)])
@by_kernels
def test_steps_on_top_of_the_kernels_prefill(operator, shape, dtype):
    """70 steps from the state that impl="triton" left at 1,000 tokens, over chunk ends, against float64."""
    G, H, K, V = shape if operator.delta or shape != WIDE else (2, 2, 192, 256)
    T, steps, C = 1000, 70, 64 if max(K, V) <= 128 else 32
    inputs = on("cuda", operator.inputs(B=3, T=T + steps, G=G, H=H, K=K, V=V, L=12, decay=0.05), dtype)
    exact = operator({n: x.double() for n, x in inputs.items()}, impl="torch").output[:, T:]
    head = {n: x[:, :T].detach() for n, x in inputs.items()}
    state = DecodeState.of(operator(head, chunk_size=C, output_final_state=True, impl="triton").final_state)
    function = log_linear_delta_rule_step if operator.delta else log_linear_attention_step
    outputs = torch.stack(
        [function(*(inputs[n][:, T + t].detach() for n in operator.names), state, impl="triton") for t in range(steps)],
        1,
    )
    budget = STEP_BUDGET[operator.name][dtype]
    assert relative_error(outputs, exact) < budget
    assert max(relative_error(outputs[:, t], exact[:, t]) for t in range(steps)) < 2 * budget
    assert state.fenwick.position.tolist() == [T + steps] * 3


@by_kernels
def test_a_step_in_a_graph_and_without_waiting(operator):
    inputs = on("cuda", operator.inputs(B=2, T=140, G=1, H=2, K=64, V=64, L=9), torch.float32)
    whole = operator({n: x.double() for n, x in inputs.items()}, impl="torch").output
    function = log_linear_delta_rule_step if operator.delta else log_linear_attention_step
    empty = operator(
        {n: x[:, :1].detach() for n, x in inputs.items()}, chunk_size=16, output_final_state=True, impl="torch"
    ).final_state
    state = DecodeState.of(type(empty)._make(None if x is None else torch.zeros_like(x) for x in empty))
    token = [inputs[n][:, 0].detach().clone() for n in operator.names]
    function(*token, state)  # compiles
    state.copy_(type(empty)._make(None if x is None else torch.zeros_like(x) for x in empty))
    graph = torch.cuda.CUDAGraph()
    with waiting_is_an_error(), torch.cuda.graph(graph):
        out = function(*token, state)
    for t in range(140):
        for held, name in zip(token, operator.names, strict=True):
            held.copy_(inputs[name][:, t])
        graph.replay()
        assert relative_error(out, whole[:, t]) < 3e-5, t


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@by_kernels
def test_seventy_thousand_steps(operator, dtype):
    """From nothing, from 37 and from 1,000 tokens on: every single step against the full forward in float64.

    In bfloat16 the first steps after 1,000 tokens have the prefill kernels' rounding in them, up to twice the budget in
    a single token; later ones hardly more than the output's own."""
    budget = STEP_BUDGET[operator.name][dtype]
    starts, steps = [0, 37, 1000], 70_000
    rows = [operator.inputs(B=1, T=n + steps, G=1, H=2, K=64, V=64, L=18, decay=0.01) for n in starts]
    rows = [on("cuda", row, dtype) for row in rows]
    exact = []
    with torch.no_grad():
        for row, n in zip(rows, starts, strict=True):
            exact.append(operator({name: x.double() for name, x in row.items()}, impl="torch").output[0, n:])
        states = []
        for row, n in zip(rows, starts, strict=True):
            head = {name: x[:, : max(n, 1)] for name, x in row.items()}
            states.append(operator(head, output_final_state=True, impl="triton").final_state)
    parts_of = zip(*states, strict=True)
    state = DecodeState.of(type(states[0])._make(None if x[0] is None else torch.cat(x) for x in parts_of))
    state.fenwick.position[0] = 0  # of what was only its shape
    function = log_linear_delta_rule_step if operator.delta else log_linear_attention_step
    inputs = {
        name: torch.cat([row[name][:, n:] for row, n in zip(rows, starts, strict=True)]).detach()
        for name in operator.names
    }
    token = {name: x[:, 0].clone() for name, x in inputs.items()}
    outputs = torch.empty(steps, 3, 2, 64, dtype=dtype, device="cuda")
    before = [None if x is None else x.clone() for x in (*state.fenwick, state.inverse)]
    function(*token.values(), state)  # compiles
    for own, old in zip((*state.fenwick, state.inverse), before, strict=True):
        if own is not None:
            own.copy_(old)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*token.values(), state)
    for t in range(steps):
        for name, x in token.items():
            x.copy_(inputs[name][:, t])
        graph.replay()
        outputs[t] = out
    for row, n in enumerate(starts):
        error = (outputs[:, row].double() - exact[row]).flatten(1).norm(dim=1) / exact[row].flatten(1).norm(dim=1)
        print(f"{operator.name} {dtype} from {n}: largest {float(error.max()):.1e}, mean {float(error.mean()):.1e}")
        assert float(error.max()) < 2 * budget, (n, int(error.argmax()), float(error.max()))
        assert float(error[1000:].max()) < budget, (n, int(error[1000:].argmax()), float(error[1000:].max()))
    assert state.fenwick.position.tolist() == [n + steps for n in starts]


@pytest.mark.parametrize("position", [-1, 2**62])
def test_a_wrong_position_ends_the_process_with_its_name(operator, position):
    code = (
        "import torch; from loglinear.ops import *\n"
        "sizes = dict(num_levels=8, chunk_size=16, groups=1, heads=1, key_dim=16, value_dim=16)\n"
        f"state = FenwickState.zeros(2, device='cuda', **{operator.kind}, **sizes)\n"
        "DecodeState.of(state); torch.cuda.synchronize(); print('right')\n"
        f"state.position[1] = {position}\n"
        "DecodeState.of(state); torch.cuda.synchronize(); print('wrong')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.split() == ["right"] and out.returncode != 0
    assert "state.position must be from 0 to 2**62 - 1" in out.stderr

"""The compiled kernels of diagonal gates on a GPU, as `test_triton_gpu.py` has those of scalar ones: without the delta
rule (-k "not diagonal_delta_rule") and with it (-k diagonal_delta_rule)."""

import pytest
import torch

from loglinear.fenwick import num_levels
from loglinear.partition import FENWICK, Partition
from tests.kernels.emulated import STATES
from tests.kernels.emulation import make, tokens_before
from tests.kernels.test_triton_gpu import HEADS, check, poison, run_all
from tests.ops.operators import DIAGONAL_GATES, parametrize, relative_error
from tests.ops.test_diagonal_gates import strong_log_decay
from tests.waiting import waiting_is_an_error

pytestmark = [pytest.mark.gpu, parametrize(DIAGONAL_GATES)]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def inputs_of(operator, B, T, G, H, K, V, L, dtype=torch.bfloat16, **options):
    return make(B, T, G, H, K, V, L, dtype, delta=operator.delta, diagonal=True, **options)


@DTYPES
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_error_of_every_default_plan(operator, heads, dtype):
    check(inputs_of(operator, 2, 1111, *heads, 12, dtype), dtype, scale=0.7)


@DTYPES
@pytest.mark.parametrize("chunk_size", [16, 32, 64])
@pytest.mark.parametrize("heads", [(1, 2, 64, 64), (1, 2, 128, 64)], ids=str)
def test_error_of_every_state_chunk(operator, heads, chunk_size, dtype):
    first = inputs_of(operator, 2, tokens_before(chunk_size), *heads, 9, dtype, seed=1)
    state = operator(first, impl="triton", chunk_size=chunk_size, output_final_state=True).final_state
    options = dict(initial_state=state, final=True, chunk_size=chunk_size)
    # Those of a scalar gate: the diagonal one's errors are at most 5 % larger.
    emulated = STATES[chunk_size] if operator.delta and dtype == torch.bfloat16 else None
    check(inputs_of(operator, 2, 700, *heads, 9, dtype), dtype, emulated=emulated, **options)


@DTYPES
@pytest.mark.parametrize("chunk_size", [16, 32, 64])
@pytest.mark.parametrize("width", [16, 32])
def test_error_of_narrow_heads(operator, width, chunk_size, dtype, request):
    """Chunks of 16 tokens and keys of 16 numbers are the smallest tiles of a product."""
    if (width, chunk_size) == (16, 16) and dtype != torch.bfloat16:
        request.applymarker(pytest.mark.xfail(raises=ValueError, strict=True, reason="Triton miscompiles it: refused"))
    check(inputs_of(operator, 1, 700, 1, 2, width, width, 9, dtype), dtype, final=True, chunk_size=chunk_size)


@pytest.mark.parametrize("T", [1, 15, 63, 64, 65, 127, 128, 129, 1023, 1025, 4095, 4097, 16384, 65536])
def test_error_at_every_length(operator, T):
    check(inputs_of(operator, 1, T, 1, 2, 128, 64, num_levels(T), float32_scales=True), torch.bfloat16)


@pytest.mark.parametrize("levels", [1, 4, 8, 9, 11, 20, 40])
def test_error_at_every_number_of_levels(operator, levels):
    check(inputs_of(operator, 1, 9000, 1, 2, 128, 64, levels), torch.bfloat16)


@pytest.mark.parametrize("levels", [1, 10, 18])
def test_three_tiers(operator, levels):
    """More than 64 * 64 * 2 chunks of 16 tokens."""
    inputs = inputs_of(operator, 1, 16 * 8300, 1, 2, 32, 32, levels, torch.float32)
    check(inputs, torch.float32, final=True, chunk_size=16)


@DTYPES
@pytest.mark.parametrize("kind", ["mean -2.5", "single tokens", "resets", "channels apart"])
def test_error_behind_strong_gates(operator, kind, dtype):
    inputs = inputs_of(operator, 1, 700, 2, 2, 64, 64, 11, dtype)
    log_decay = strong_log_decay(kind, inputs["log_decay"].shape).float().cuda().requires_grad_()
    check(inputs | {"log_decay": log_decay}, dtype)


@pytest.mark.parametrize("levels", [1, 9, 20])
@pytest.mark.parametrize(
    "ends", [[0, 1, 640, 640, 5001, 9000], [*range(0, 9000, 70), *[9000] * 31]], ids=["few", "many and empty ones"]
)
def test_packed_sequences(operator, levels, ends):
    cu_seqlens = torch.tensor(ends, device="cuda")
    check(inputs_of(operator, 1, 9000, 1, 2, 128, 64, levels), torch.bfloat16, cu_seqlens=cu_seqlens)


@DTYPES
@pytest.mark.parametrize("partition", [Partition(4, 16), Partition(4), Partition(16, 16), Partition(64, 16)], ids=str)
def test_error_of_every_partition(operator, partition, dtype):
    check(inputs_of(operator, 2, 1111, 2, 4, 64, 64, 20, dtype), dtype, scale=0.7, partition=partition)


def test_equal_channels_are_the_scalar_gate(operator):
    scalar = make(1, 2000, 1, 2, 64, 64, 12, torch.float32, delta=operator.delta)
    log_decay = scalar["log_decay"][..., None].expand(1, 2000, 2, 64).detach().requires_grad_()
    expected, actual = run_all(scalar, operator), run_all(scalar | {"log_decay": log_decay}, operator)
    actual[4] = actual[4].sum(-1)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-4


def test_two_runs_give_the_same_bits(operator):
    inputs = inputs_of(operator, 2, 5000, 1, 6, 128, 64, 14)
    assert all(torch.equal(a, b) for a, b in zip(run_all(inputs), run_all(inputs), strict=True))


@pytest.mark.parametrize("T", [300, 9000])
def test_a_repeated_call_gives_the_same_bits(operator, T, monkeypatch):
    from loglinear.kernels.triton import replay

    calls = [inputs_of(operator, 1, T, 1, 4, 64, 64, 15, seed=seed) for seed in range(4)]
    with monkeypatch.context() as patch:
        patch.setattr(replay, "is_watched", lambda: True)
        expected = [run_all(x) for x in calls]
    for x, results in zip(calls, expected, strict=True):
        poison()
        assert all(torch.equal(a, b) for a, b in zip(run_all(x), results, strict=True))


def test_compiles_as_one_graph_and_passes_opcheck(operator):
    from loglinear.kernels.triton import chunkwise

    inputs = inputs_of(operator, 1, 500, 1, 2, 64, 64, 10)
    compiled = torch.compile(lambda x: operator(x, impl="triton"), fullgraph=True)
    assert torch.equal(compiled(inputs).output, operator(inputs, impl="triton").output)
    tensors = [inputs.get(name) for name in DIAGONAL_GATES[1].names]
    torch.library.opcheck(chunkwise, (*tensors, None, None, None, 1.0, 64, True, FENWICK.numbers))


@pytest.mark.parametrize("ends", [None, [0, 100, 2000]], ids=["dense", "packed"])
def test_never_waits_for_the_device(operator, ends):
    inputs = inputs_of(operator, 1, 2000, 1, 2, 64, 64, 12)
    cu_seqlens = None if ends is None else torch.tensor(ends, device="cuda")

    def run():
        out = operator(inputs, cu_seqlens=cu_seqlens, output_final_state=True, impl="triton")
        more = operator(inputs, cu_seqlens=cu_seqlens, initial_state=out.final_state, impl="triton")
        return torch.autograd.grad(more.output.sum(), list(inputs.values()))

    run()
    with waiting_is_an_error():
        run()

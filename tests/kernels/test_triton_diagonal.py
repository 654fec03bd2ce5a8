"""The kernels of diagonal gates under the interpreter, without and with the delta rule: against float64, with every
gradient."""

import importlib

import pytest
import torch

from loglinear.ops import FenwickState
from loglinear.partition import FENWICK, Partition
from tests.kernels.emulated import EMULATED
from tests.kernels.emulation import errors, excesses, make, operator_of, teach_rounding
from tests.kernels.interpreter import teach_interpreter
from tests.kernels.test_triton import FACTOR, compare
from tests.ops.operators import DIAGONAL_GATES, excess, parametrize, parts, relative_error
from tests.ops.test_diagonal_gates import strong_log_decay

pytest.importorskip("triton")
pytestmark = [pytest.mark.interpreter, parametrize(DIAGONAL_GATES)]


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    teach_interpreter(monkeypatch.setattr)


def inputs_of(operator, T, levels=9, B=1, G=1, H=1, K=8, V=8, **options):
    return operator.inputs(B=B, T=T, G=G, H=H, K=K, V=V, L=levels, **options)


def state_at(operator, position, levels, partition=FENWICK, **sizes):
    """A state of `position` tokens, detached."""
    options = dict(partition=partition, chunk_size=16, output_final_state=True)
    return operator(inputs_of(operator, position, levels, **sizes), **options).final_state.detach()


def joined(states):
    return FenwickState(*(torch.cat(x) if isinstance(x[0], torch.Tensor) else x[0] for x in zip(*states, strict=True)))


@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 65, 127, 129])
def test_any_length(operator, T):
    compare(inputs_of(operator, T, B=2 if T < 64 else 1))


@pytest.mark.parametrize("levels", [1, 2, 5, 6, 20])
def test_any_number_of_levels(operator, levels):
    compare(inputs_of(operator, 100, levels))


@pytest.mark.parametrize("shape", [(1, 3, 5, 3), (2, 4, 16, 20), (1, 1, 48, 40), (1, 1, 128, 64)], ids=str)
def test_groups_and_head_dims(operator, shape):
    """Several tiles of K and of V, and heads with their own decays that share queries and keys."""
    compare(inputs_of(operator, 70, 8, **dict(zip("GHKV", shape, strict=True))), scale=0.7, chunk_size=32)


@pytest.mark.parametrize("kind", ["mean -2.5", "single tokens", "resets", "channels apart"])
def test_strong_gates(operator, kind):
    """In chunks of 64 tokens, whose exp(-G) would overflow."""
    inputs = inputs_of(operator, 101, 8)
    inputs["log_decay"] = strong_log_decay(kind, inputs["log_decay"].shape).requires_grad_()
    compare(inputs, chunk_size=64)


@pytest.mark.parametrize("levels", [1, 20])
@pytest.mark.parametrize("ends", [[0, 1, 40, 40, 72, 120], [*range(0, 120, 23), *[120] * 3]], ids=str)
def test_packed_sequences(operator, levels, ends):
    compare(inputs_of(operator, 120, levels), cu_seqlens=torch.tensor(ends))


@pytest.mark.parametrize(("start", "levels"), [(37, 5), (16 * 21 + 5, 20), (16 * 70, 8)])
def test_continues_a_state(operator, start, levels):
    compare(inputs_of(operator, 70, levels), initial_state=state_at(operator, start, levels))


def test_continues_packed_states_at_different_positions(operator):
    """One has no new token; of one many readers are gathered in runs."""
    state = joined([state_at(operator, position, 9) for position in (1, 30, 16 * 66)])
    compare(inputs_of(operator, 90, 9), initial_state=state, cu_seqlens=torch.tensor([0, 50, 50, 90]))


def test_no_decay_continues_a_state(operator):
    state = state_at(operator, 37, 8)
    x = {name: y.detach().float() for name, y in inputs_of(operator, 30, 8).items()}
    state = state._replace(**{name: part.float() for name, part in parts(state).items()})
    options = dict(initial_state=state, output_final_state=True, chunk_size=16)
    zeros = torch.zeros_like(x["log_decay"])
    outs = [operator(x | {"log_decay": gate}, impl="triton", **options) for gate in (None, zeros)]
    assert torch.equal(outs[0].output, outs[1].output) and outs[0].final_state.is_diagonal


def test_two_tiers(operator):
    """More than 64 chunks: runs of readers, and prefixes above the levels. The delta rule's runs are of eight."""
    for levels in (7, 14):
        compare(inputs_of(operator, 16 * (18 if operator.delta else 66), levels, K=4, V=4), final=False, chunk_size=16)


PARTITIONS = [Partition(2, 16), Partition(4), Partition(8, 2), Partition(16, 16), Partition(64, 16)]


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
def test_every_partition(operator, partition):
    columns = partition.num_columns(150)
    for levels in (max(1, columns // 2), columns + 2)[: 1 if operator.delta else 2]:
        compare(inputs_of(operator, 150, levels, K=4, V=4), partition=partition, chunk_size=64, final=False)


@pytest.mark.parametrize("partition", [Partition(4, 4), Partition(16, 16)], ids=str)
def test_partitions_of_continued_sequences(operator, partition):
    state = joined([state_at(operator, length, 20, partition, K=4, V=4) for length in (1, 16 * 19)])
    inputs = inputs_of(operator, 90, 20, K=4, V=4)
    compare(inputs, partition=partition, initial_state=state, cu_seqlens=torch.tensor([0, 50, 90]))


def test_equal_channels_are_the_scalar_gate(operator):
    scalar = make(1, 130, 1, 2, 16, 16, 9, torch.float32, device="cpu", delta=operator.delta)
    log_decay = scalar["log_decay"][..., None].expand(1, 130, 2, 16).detach().requires_grad_()
    exact, *grads = run_all({name: x.double() for name, x in scalar.items()}, "torch")
    actual, *own = run_all(scalar | {"log_decay": log_decay}, "triton")
    own[3] = own[3].sum(-1)
    for a, e in zip([actual, *own], [exact, *grads], strict=True):
        assert relative_error(a, e) < 1e-5


def run_all(inputs, impl):
    x = {name: y.detach().requires_grad_() for name, y in inputs.items()}
    output = operator_of(x)(x, impl=impl).output
    return [output, *torch.autograd.grad(output.square().sum(), list(x.values()))]


def test_a_chunk_that_prescribes_too_much_is_refused(operator):
    x = {name: y.float() for name, y in inputs_of(operator, 5, 3).items()}
    with pytest.raises(ValueError, match="chunk_size 128 needs impl='torch': impl='triton' takes 16 to 64 here"):
        operator(x, impl="triton", chunk_size=128, output_final_state=True)


def test_what_was_not_written_is_not_read(operator, monkeypatch):
    def poisoned(empty):
        def full_of_nan(*args, **kwargs):
            x = empty(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return full_of_nan

    inputs = make(1, 245, 1, 2, 8, 8, 9, torch.float32, device="cpu", delta=operator.delta, diagonal=True)
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    found = excesses(inputs, 16)
    assert all(times <= FACTOR for times in found.values()), found


def test_slabs_of_heads_change_nothing(operator, monkeypatch):
    for module in ("diagonal_gate.forward", "scalar_gate.backward"):
        monkeypatch.setattr(importlib.import_module(f"loglinear.kernels.triton.{module}"), "SLAB_BYTES", 1)
    for module in ("delta_rule.forward", "delta_rule.backward"):
        monkeypatch.setattr(importlib.import_module(f"loglinear.kernels.triton.{module}"), "limit_of", lambda *_: 1)
    for groups in (1, 2):
        compare(inputs_of(operator, 40, 8, G=groups, H=2))


def test_float16_queries_and_strided_gates(operator):
    """Gradients have the dtypes of their inputs; a gate whose channels are not neighbours is copied."""
    inputs = make(1, 70, 1, 1, 8, 8, 8, torch.float32, device="cpu", delta=operator.delta, diagonal=True)
    inputs["q"] = inputs["q"].detach().half().requires_grad_()
    turned = inputs["log_decay"].detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_()
    assert turned.stride(3) != 1
    x = inputs | {"log_decay": turned}
    exact = {name: y.detach().double().requires_grad_() for name, y in x.items()}
    grads = []
    for impl, tensors in (("triton", x), ("torch", x), ("reference", exact)):
        output = operator(tensors, impl=impl).output
        grads.append(torch.autograd.grad(output.sum(), list(tensors.values())))
    for (name, y), a, t, e in zip(x.items(), *grads, strict=True):
        assert a.dtype == y.dtype
        assert excess(a, t, e) <= FACTOR, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_in_16_bits(operator, monkeypatch, dtype):
    """At no more than the errors that their rounding makes, with strong gates too."""
    teach_rounding(monkeypatch.setattr)
    limits = EMULATED[operator.name][dtype]
    inputs = make(1, 200, 1, 2, 64, 64, 9, dtype, device="cpu", delta=operator.delta, diagonal=True)
    found = errors(inputs)
    assert all(found[name] <= limit for name, limit in limits.items()), found


def test_bfloat16_products_behind_strong_gates(operator, monkeypatch):
    """The error of an exponent counts in the results: one in bfloat16 would be wrong by a tenth."""
    teach_rounding(monkeypatch.setattr)
    inputs = make(1, 130, 1, 1, 40, 40, 9, torch.bfloat16, device="cpu", delta=operator.delta, diagonal=True)
    inputs["log_decay"] = strong_log_decay("resets", inputs["log_decay"].shape).float().requires_grad_()
    found = errors(inputs)
    limits = EMULATED[operator.name][torch.bfloat16]
    assert all(found[name] <= 1.3 * limit for name, limit in limits.items()), found

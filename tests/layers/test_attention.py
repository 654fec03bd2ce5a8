import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from loglinear.layers import Attention, AttentionContext, attention, rotary_tables
from loglinear.layers.attention import rotate


def context(positions: Tensor, **options) -> AttentionContext:
    return AttentionContext(*rotary_tables(positions, 6, 100.0), **options)


def packed_context(lengths: list[int], head_dim: int, device: str = "cpu") -> AttentionContext:
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    return AttentionContext(*rotary_tables(positions, head_dim, 100.0), lengths=torch.tensor(lengths))


def test_attention_is_the_softmax_definition_with_grouped_heads_and_rotation() -> None:
    torch.manual_seed(0)
    layer = Attention(8, 4, 2, 6).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    q, k, v = (t.view(2, 5, -1, 6) for t in layer.qkv_proj(x).split([24, 12, 12], -1))
    angles = torch.outer(torch.arange(5.0), 100.0 ** -(torch.arange(0, 6, 2) / 6))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rotated(t: Tensor) -> Tensor:
        turned = torch.complex(t[..., :3], t[..., 3:]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    expected = torch.zeros(2, 5, 4, 6, dtype=torch.float64)
    q, k = rotated(q), rotated(k)
    for h in range(4):
        scores = q[:, :, h] @ k[:, :, h // 2].transpose(1, 2) * 6**-0.5
        scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
        expected[:, :, h] = F.softmax(scores, -1) @ v[:, :, h // 2]
    actual, weights = layer(x, context(torch.arange(5)[None]))
    assert weights is None
    torch.testing.assert_close(actual, layer.out_proj(expected.flatten(2)), rtol=1e-6, atol=1e-7)


def test_packed_documents_attend_only_to_themselves() -> None:
    torch.manual_seed(0)
    layer = Attention(8, 4, 2, 6).double()
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    packed, _ = layer(x, packed_context([3, 1, 0, 3], 6))
    parts = [layer(x[:, a:b], context(torch.arange(b - a)[None]))[0] for a, b in ((0, 3), (3, 4), (4, 7))]
    torch.testing.assert_close(packed, torch.cat(parts, 1))


@pytest.mark.parametrize("lengths", [[4, 1, 0, 6, 4, 3, 8], [5, 0, 3], [8, 4], [0, 7, 0]])
def test_runs_of_documents_and_long_ones_keep_their_order(lengths: list[int], monkeypatch) -> None:
    torch.manual_seed(0)
    layer = Attention(8, 4, 2, 8).double()
    x = torch.randn(1, sum(lengths), 8, dtype=torch.float64)
    expected, _ = layer(x, packed_context(lengths, 8))
    runs = []

    def at_once(heads: attention.Heads, lengths: list[int]) -> Tensor:
        runs.append(lengths)
        return torch.cat(layer._one_by_one(heads, lengths), dim=2)

    monkeypatch.setattr(layer, "_at_once", at_once)
    for name, value in (("AT_ONCE", True), ("_has_flash", lambda heads: True), ("LONG", 4), ("PLANNED", 4)):
        monkeypatch.setattr(attention, name, value)
    torch.testing.assert_close(layer(x, packed_context(lengths, 8))[0], expected)
    assert [n for run in runs for n in run if n] == [n for n in lengths if n % 4]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(4, 4, 32), (4, 2, 64), (2, 1, 128), (1, 1, 160)])
@pytest.mark.parametrize("lengths", [[1, 3, 0, 200] * 5, [127, 129, 4096, 0, 1500, 64, 1024, 1, 4096, 5120] + [0] * 14])
def test_documents_at_once_are_as_exact_as_one_by_one(heads, key_heads, head_dim, lengths, dtype, monkeypatch) -> None:
    torch.manual_seed(0)
    layer = Attention(64, heads, key_heads, head_dim).double()
    x = torch.randn(1, sum(lengths), 64, dtype=torch.float64)
    weight = torch.randn_like(x)

    def results(device: str, dtype: torch.dtype) -> list[Tensor]:
        own = copy.deepcopy(layer).to(device, dtype)
        inputs = x.to(device, dtype, copy=True).requires_grad_()
        y, _ = own(inputs, packed_context(lengths, head_dim, device))
        y.backward(weight.to(device, dtype))
        return [t.double().cpu() for t in (y, inputs.grad, own.qkv_proj.weight.grad)]

    calls = []
    at_once = Attention._at_once
    monkeypatch.setattr(Attention, "_at_once", lambda *args: calls.append(1) or at_once(*args))
    exact, together = results("cpu", torch.float64), results("cuda", dtype)
    assert bool(calls) == (attention.AT_ONCE and dtype != torch.float32 and head_dim in attention.WIDTHS)
    monkeypatch.setattr(attention, "AT_ONCE", False)
    for wanted, ours, theirs in zip(exact, together, results("cuda", dtype), strict=True):
        assert (ours - wanted).norm() <= 1.1 * (theirs - wanted).norm()


class Older(NamedTuple):
    """A slice after older tokens of one process."""

    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, layer: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> "Older":
        _, k, v = (t.unflatten(-1, (-1, layer.head_dim)) for t in layer.qkv_proj(x).split(layer.widths, dim=-1))
        return cls(rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2))

    def with_older_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)


def in_two_slices(layer: Attention, x: Tensor, shared: AttentionContext, first: int) -> Tensor:
    """The second slice continues the first document after `first` tokens, or the rows if none are packed."""
    cos, sin, lengths = shared.cos, shared.sin, shared.lengths
    older = Older.of(layer, x[:, :first], cos[:, :first], sin[:, :first])
    begin = AttentionContext(cos[:, :first], sin[:, :first])
    rest = AttentionContext(cos[:, first:], sin[:, first:], slices=older)
    if lengths is not None:
        rest = rest._replace(lengths=torch.cat([lengths[:1] - first, lengths[1:]]))
    return torch.cat([layer(x[:, :first], begin)[0], layer(x[:, first:], rest)[0]], 1)


@pytest.mark.parametrize("key_heads", [1, 4])
@pytest.mark.parametrize(
    ("lengths", "first"), [(None, 5), (None, 8), ([9], 4), ([9, 3, 4, 1], 5), ([9, 3, 4, 1], 8), ([10, 4, 3], 2)]
)
def test_a_slice_attends_to_the_older_keys_of_the_document_it_continues(lengths, first, key_heads, monkeypatch):
    torch.manual_seed(0)
    layer = Attention(8, 4, key_heads, 8).double()
    rows, time = (2, 9) if lengths is None else (1, sum(lengths))
    x = torch.randn(rows, time, 8, dtype=torch.float64)
    shared = packed_context([time] if lengths is None else lengths, 8)
    shared = shared._replace(lengths=None) if lengths is None else shared
    expected, _ = layer(x, shared)
    torch.testing.assert_close(in_two_slices(layer, x, shared, first), expected)
    monkeypatch.setattr(layer, "_at_once", lambda heads, n: torch.cat(layer._one_by_one(heads, n), dim=2))
    for name, value in (("AT_ONCE", True), ("_has_flash", lambda heads: True), ("LONG", 4), ("PLANNED", 4)):
        monkeypatch.setattr(attention, name, value)
    torch.testing.assert_close(in_two_slices(layer, x, shared, first), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(4, 4, 32), (4, 2, 64), (2, 1, 160)])
@pytest.mark.parametrize(("lengths", "first"), [(None, 700), ([1300, 129, 4096, 60], 700), ([5000], 904)])
def test_a_slice_is_as_exact_as_the_whole_on_a_gpu(lengths, first, heads, key_heads, head_dim, dtype) -> None:
    torch.manual_seed(0)
    layer = Attention(64, heads, key_heads, head_dim).double()
    rows, time = (2, 1500) if lengths is None else (1, sum(lengths))
    x = torch.randn(rows, time, 64, dtype=torch.float64)
    weight = torch.randn_like(x)

    def results(device: str, dtype: torch.dtype, attend: Callable[..., Tensor]) -> list[Tensor]:
        own = copy.deepcopy(layer).to(device, dtype)
        inputs = x.to(device, dtype, copy=True).requires_grad_()
        shared = packed_context([time] if lengths is None else lengths, head_dim, device)
        y = attend(own, inputs, shared._replace(lengths=None) if lengths is None else shared)
        y.backward(weight.to(device, dtype))
        return [t.double().cpu() for t in (y, inputs.grad, own.qkv_proj.weight.grad)]

    def whole(own: Attention, x: Tensor, shared: AttentionContext) -> Tensor:
        return own(x, shared)[0]

    exact = results("cpu", torch.float64, whole)
    found = results("cuda", dtype, lambda own, x, shared: in_two_slices(own, x, shared, first))
    for wanted, ours, theirs in zip(exact, found, results("cuda", dtype, whole), strict=True):
        assert (ours - wanted).norm() <= 1.3 * (theirs - wanted).norm()


@pytest.mark.parametrize(
    ("sizes", "name"), [((8, 4, 3, 6), "num_attention_heads"), ((8, 4, 2, 5), "attention_head_dim")]
)
def test_impossible_sizes_raise(sizes: tuple[int, int, int, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Attention(*sizes)


def test_a_graph_of_any_length_is_one_graph() -> None:
    layer, shared = Attention(8, 4, 2, 6), context(torch.arange(9)[None])
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    for length in (9, 5):
        x = torch.randn(2, length, 8)
        some = shared._replace(cos=shared.cos[:, :length], sin=shared.sin[:, :length])
        torch.testing.assert_close(compiled(x, some)[0], layer(x, some)[0])

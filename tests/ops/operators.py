"""Both operators behind one call, with inputs at a natural scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear.ops import FenwickState, LogLinearOutput, log_linear_attention, log_linear_delta_rule
from loglinear.partition import FENWICK, Partition
from loglinear.reference import dense_delta_rule, dense_scalar_gate


@dataclass(frozen=True)
class Operator:
    name: str
    delta: bool
    diagonal: bool = False  # a decay for each channel of the keys

    @property
    def kind(self) -> dict[str, bool]:
        """The options of a state of this operator."""
        return dict(delta_rule=self.delta, diagonal_gate=self.diagonal)

    @property
    def names(self) -> list[str]:
        return ["q", "k", "v", "log_decay", *(["beta"] if self.delta else []), "level_scales"]

    def __call__(self, inputs: dict[str, Tensor], **options) -> LogLinearOutput:
        function = log_linear_delta_rule if self.delta else log_linear_attention
        return function(*(inputs[name] for name in self.names), **options)

    def dense(self, inputs: dict[str, Tensor], partition: Partition = FENWICK) -> Tensor:
        """The O(T^2) definition, row by row."""
        R = inputs["v"].shape[2] // inputs["q"].shape[2]
        define = dense_delta_rule if self.delta else dense_scalar_gate
        rows = []
        for b in range(len(inputs["q"])):
            heads = {name: inputs[name][b].transpose(0, 1) for name in self.names}
            heads |= {name: heads[name].repeat_interleave(R, 0) for name in "qk"}
            rows.append(define(*heads.values(), partition).transpose(0, 1))
        return torch.stack(rows)

    def inputs(self, B=2, T=37, G=2, H=4, K=5, V=3, L=9, dtype=torch.float64, decay=0.3) -> dict[str, Tensor]:
        """Fresh random leaves; keys have length 1 and beta reaches 1.8, so transitions may flip signs."""
        x = {
            "q": torch.randn(B, T, G, K, dtype=torch.float64),
            "k": F.normalize(torch.randn(B, T, G, K, dtype=torch.float64), dim=-1),
            "v": torch.randn(B, T, H, V, dtype=torch.float64),
            "log_decay": -decay * torch.rand(B, T, H, *([K] if self.diagonal else []), dtype=torch.float64),
            "level_scales": 10 ** (3 * torch.rand(B, T, H, L, dtype=torch.float64) - 2),
        }
        if self.delta:
            x["beta"] = 1.8 * torch.rand(B, T, H, dtype=torch.float64)
        return {name: x[name].to(dtype).requires_grad_() for name in self.names}


SCALAR_GATES = [Operator("scalar_gate", delta=False), Operator("delta_rule", delta=True)]
DIAGONAL_GATES = [Operator(f"diagonal_{one.name}".replace("scalar_", ""), one.delta, True) for one in SCALAR_GATES]
OPERATORS = SCALAR_GATES + DIAGONAL_GATES


def parametrize(operators: list[Operator], **options: Any) -> pytest.MarkDecorator:
    """Return the mark of a test with the argument `operator`."""
    return pytest.mark.parametrize("operator", operators, ids=lambda operator: operator.name, **options)


by_kernels = parametrize(SCALAR_GATES, indirect=True)  # for tests of impl="triton", where `operator` is a fixture


PLACES = ("position", "first")  # of a state: integers


def parts(state: FenwickState) -> dict[str, Tensor]:
    """The differentiable parts of a state."""
    return {name: x for name, x in state._asdict().items() if isinstance(x, Tensor) and name not in PLACES}


def random_loss(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.randn_like(x) for x in tensors)


def gradients(tensors: list[Tensor], weights: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    loss = sum((x * w).sum() for x, w in zip(tensors, weights, strict=True))
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64; NaN counts as infinite."""
    actual, expected = actual.detach().double(), expected.detach().double()
    error = float((actual - expected).norm() / expected.norm().clamp(min=1e-300))
    return error if error == error else float("inf")


def excess(actual: Tensor, twin: Tensor, exact: Tensor, size: float = 0.0) -> float:
    """Return the error against `exact` over that of the same-dtype twin; NaN counts as infinite.

    The twin computes the same in plain torch, in the same test and on the same machine, so a limit on this number is
    one for any machine. Where the twin happens to be nearer than one rounding of `exact`, or of a number of that `size`
    where `exact` is a difference, one rounding counts."""
    actual, exact = actual.detach().double(), exact.detach().double()
    rounding = torch.finfo(twin.dtype).eps * max(float(exact.norm()), size)
    base = max(float((twin.detach().double() - exact).norm()), rounding)
    error = float((actual - exact).norm())
    if error == 0:
        return 0.0
    return error / base if base and error == error else float("inf")


def check_pieces(
    operator: Operator, inputs: dict[str, Tensor], cuts: list[int], whole: LogLinearOutput, exact: float, **options: Any
) -> Tensor:
    """Assert that pieces of these lengths give the outputs, the last state and every gradient of `whole`.

    The limit of gradients is ten times `exact`. Return the outputs of the pieces, joined.
    """
    state, outputs = None, []
    for piece in zip(*(x.split(cuts, 1) for x in inputs.values()), strict=True):
        given = dict(zip(inputs, piece, strict=True))
        out = operator(given, initial_state=state, output_final_state=True, **options)
        outputs.append(out.output)
        state = out.final_state
    output = torch.cat(outputs, 1)
    assert relative_error(output, whole.output) < exact
    ends, expected_ends = parts(state), parts(whole.final_state)
    for name, part in ends.items():
        assert torch.allclose(part, expected_ends[name], rtol=exact, atol=exact), name
    weights = random_loss(output, *ends.values())
    actual = gradients([output, *ends.values()], weights, list(inputs.values()))
    expected = gradients([whole.output, *expected_ends.values()], weights, list(inputs.values()))
    for name, a, e in zip(inputs, actual, expected, strict=True):
        assert relative_error(a, e) < 10 * exact, name
    return output

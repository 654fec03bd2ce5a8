"""The calls of operators that are made on one process and on several, with the same numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loglinear import bucket_scores, parallel
from loglinear.parallel import Slices
from loglinear.partition import FENWICK, Partition
from tests.ops.operators import OPERATORS, Operator

RANKS = (2, 3, 4, 8)
SLICED = {False: parallel.log_linear_attention, True: parallel.log_linear_delta_rule}


@dataclass(frozen=True)
class Case:
    """One call of an operator."""

    name: str
    T: int
    C: int = 4
    L: int = 9
    B: int = 2
    documents: tuple[int, ...] | None = None
    partition: Partition = FENWICK
    options: dict[str, Any] = field(default_factory=dict)
    decay: float = 0.3
    dtype: torch.dtype = torch.float64

    def inputs(self, operator: Operator) -> dict[str, Tensor]:
        torch.manual_seed(0)
        B = self.B if self.documents is None else 1
        inputs = operator.inputs(B=B, T=self.T, L=self.L, decay=self.decay)
        return {name: x.detach().to(self.dtype).requires_grad_() for name, x in inputs.items()}

    def weights(self, inputs: dict[str, Tensor]) -> Tensor:
        return torch.randn(inputs["v"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    @property
    def common(self) -> dict[str, Any]:
        return dict(chunk_size=self.C, partition=self.partition, **self.options)

    def whole(self, operator: Operator) -> dict[str, Tensor]:
        """Return the output and every gradient from one process."""
        return self._whole(operator, self.inputs(operator))

    def in_float64(self, operator: Operator) -> dict[str, Tensor]:
        """Return the same in float64, from the same rounded inputs."""
        inputs = {name: x.detach().double().requires_grad_() for name, x in self.inputs(operator).items()}
        return self._whole(operator, inputs)

    def _whole(self, operator: Operator, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        boundaries = None if self.documents is None else torch.tensor(self.documents)
        output = operator(inputs, cu_seqlens=boundaries, **self.common).output
        (output * self.weights(inputs)).sum().backward()
        return {"output": output.detach(), **{name: x.grad for name, x in inputs.items()}}

    def sliced(self, operator: Operator, mesh: Any) -> dict[str, Tensor]:
        """Return the same from this rank: the gathered output, and the gradients of the whole inputs from its part."""
        inputs = self.inputs(operator)
        chunk_size = self.partition.chunk_near(self.C, 4096)
        slices = Slices.of(self.T, mesh, chunk_size=chunk_size, cu_seqlens=self.documents)
        local = [slices.take(x) for x in inputs.values()]
        output = SLICED[operator.delta](*local, slices=slices, **self.common)
        (output * slices.take(self.weights(inputs))).sum().backward()
        grads = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in inputs.items()}
        return {"output": slices.gather(output).detach(), **grads}

    def scores(self, q: Tensor, k: Tensor, tensors: Tensor, **how: Any) -> dict[str, Tensor]:
        """Return the scores of buckets, their tokens, and the gradients of q and k."""
        compute = parallel.bucket_scores if "slices" in how else bucket_scores
        slices = how.get("slices")
        local = [x if slices is None else slices.take(x) for x in (q, k, tensors)]
        found = compute(*local[:2], num_columns=self.L, partition=self.partition, **how)
        (found.scores * local[2]).sum().backward()
        counts = found.tokens.expand(len(q), -1, -1)
        whole = [x if slices is None else slices.gather(x) for x in (found.scores, counts)]
        return {"scores": whole[0].detach(), "tokens": whole[1], "q": q.grad, "k": k.grad}

    def scores_inputs(self) -> list[Tensor]:
        """Return q, k and the weights of the scores in the loss."""
        inputs = self.inputs(OPERATORS[0])
        q, k = inputs["q"], inputs["k"]
        return [q, k, torch.randn(*q.shape[:3], self.L, dtype=q.dtype, generator=torch.Generator().manual_seed(1))]

    def whole_scores(self) -> dict[str, Tensor]:
        boundaries = None if self.documents is None else torch.tensor(self.documents)
        return self.scores(*self.scores_inputs(), cu_seqlens=boundaries)

    def sliced_scores(self, mesh: Any) -> dict[str, Tensor]:
        slices = Slices.of(self.T, mesh, chunk_size=self.partition.chunk_near(self.C, 4096), cu_seqlens=self.documents)
        return self.scores(*self.scores_inputs(), slices=slices)


ROWS = [Case(f"rows_{T}", T) for T in (1, 5, 31, 32, 33, 77)]
PACKED = [
    Case("one_document", 50, documents=(0, 50)),
    Case("crossing", 60, documents=(0, 7, 33, 60)),
    Case("long_first", 64, documents=(0, 55, 57, 64)),
    Case("long_last", 90, documents=(0, 3, 3, 6, 90)),
    Case("many", 61, C=2, documents=(0, 1, 5, 14, 22, 23, 40, 41, 61)),
    Case("on_the_boundaries", 64, documents=(0, 16, 32, 48, 64)),
]
TREES = [
    *(Case(f"levels_{L}", 67, L=L) for L in (1, 2, 3, 4, 5, 64)),
    Case("radix_4", 150, L=12, partition=Partition(4)),
    Case("radix_16", 200, L=20, partition=Partition(16, finest_block=4)),
    Case("radix_4_capped", 150, L=5, partition=Partition(4, finest_block=2)),
    Case("largest_block", 130, L=12, partition=Partition(2, largest_block=16)),
    Case("largest_block_capped", 130, L=7, partition=Partition(4, finest_block=4, largest_block=16)),
    Case("packed_radix_4", 120, L=7, C=4, documents=(0, 9, 100, 120), partition=Partition(4)),
]
OTHERS = [
    Case("chunks_of_one", 21, C=1),
    Case("strong_decay", 70, decay=200.0),
    Case("reference", 21, C=2, options={"impl": "reference", "scale": 0.5}),
    Case("scale", 40, options={"scale": 0.25}),
]
CASES = {case.name: case for case in (*ROWS, *PACKED, *TREES, *OTHERS)}
SCORED = ("rows_5", "rows_77", "many", "levels_3", "radix_16", "largest_block_capped", "packed_radix_4")
ON_EIGHT = ("rows_77", "many", "levels_3", "radix_4")  # eight processes on two cores are slow
DTYPES = [Case(str(dtype), 77, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
BY_NAME = {operator.name: operator for operator in OPERATORS}


def cases_on(ranks: int) -> list[Case]:
    """Return the cases that so many processes run."""
    return [CASES[name] for name in ON_EIGHT] if ranks == 8 else [*CASES.values(), *DTYPES]

"""CUDA graphs of whole calls. A small model is launch-bound: the CPU launches hundreds of kernels in every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WARM_UPS = 2  # calls before the recording, in which kernels are compiled and tuned

Batch = Mapping[str, Tensor]


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    batch: dict[str, Tensor]  # the graph reads its input here
    results: Sequence[Tensor | None]


class Graphs:
    """A function of a batch of CUDA tensors as CUDA graphs, one for each set of shapes.

    The first call with new shapes runs the function WARM_UPS times and records it. Later calls copy their batch and
    launch the recording. Each call overwrites the results of all earlier ones, in one memory.

    The function must not wait for the device, and it must read all that changes between calls from tensors that stay
    where they are, such as parameters.
    """

    def __init__(self, function: Callable[[Batch], Sequence[Tensor | None]]) -> None:
        self.function = function
        self.recordings: dict[tuple[tuple[str, torch.Size], ...], _Recording] = {}

    def __call__(self, batch: Batch) -> Sequence[Tensor | None]:
        """Return the results for a batch."""
        shapes = tuple((name, x.shape) for name, x in batch.items())
        if shapes not in self.recordings:
            self.recordings[shapes] = self._record(batch)
        recording = self.recordings[shapes]
        for name, x in batch.items():
            recording.batch[name].copy_(x, non_blocking=True)
        recording.graph.replay()
        return recording.results

    def _record(self, batch: Batch) -> _Recording:
        own = {name: x.clone() for name, x in batch.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.function(own)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.recordings.values())).graph.pool() if self.recordings else None
        with torch.cuda.graph(graph, pool=pool):
            results = self.function(own)
        return _Recording(graph, own, results)

"""Tensors that nobody changes, and the results that follow from them: made once for all layers and their backward.

A result is stored at the tensor itself, in its attribute `layouts`, and dies with it. No key is an address, and no
version is compared: a tensor of a caller's may change without a trace, by a collective or by another program. So a
tensor is `unchanging` only if this library made it, for calls of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from loglinear.kernels.torch.recording import is_traced

Made = TypeVar("Made")
MOST = 64  # results of one tensor; a model has a few for each kind of layer


class Results(dict[Hashable, Any]):
    """The results at one tensor, and the `_origin` that all of them have.

    They belong to one stream. A CUDA graph has memory of its own and computes everything anew when it runs, so it takes
    no result from before its recording, and leaves none.
    """

    origin: tuple[int, bool] | None = None
    are_of_zeros = False


def unchanging(x: Tensor, is_zero: bool = False) -> Tensor:
    """Declare that nobody changes x from here on, and return it. In a graph or a transform this has no effect.

    is_zero: True to declare as well that all its numbers are 0.
    """
    if not is_traced():
        results = Results()
        results.origin, results.are_of_zeros = _origin(x), is_zero
        x.layouts = results  # type: ignore[attr-defined]
    return x


def is_unchanging(x: Tensor | None) -> bool:
    """True if x was declared `unchanging` and results can be stored at it here."""
    return x is not None and _results_of(x) is not None


def is_zero(x: Tensor) -> bool:
    """True if x was declared to be 0 for good; False may be either."""
    results = _results_of(x)
    return results is not None and results.are_of_zeros


def once(make: Callable[[], Made], name: Hashable, *tensors: Tensor | None) -> Made:
    """Return `make()`, or its result from an earlier call with this name and these tensors.

    The result must follow from both. It is stored at the first tensor if all are `unchanging`; None stands for no
    tensor.
    """
    first, *others = tensors
    if first is None or not all(x is None or is_unchanging(x) for x in tensors):
        return make()
    results = _results_of(first)
    assert results is not None
    known = results.get(name)
    if known is not None and list(map(id, known[0])) == list(map(id, others)):  # both alive: an id is one tensor
        return known[1]
    with torch.inference_mode(False), torch.no_grad():  # later calls may save it for their backward pass
        made = make()
    if len(results) >= MOST:
        results.clear()
    results[name] = (others, made)
    return made


def _results_of(x: Tensor) -> Results | None:
    if is_traced():
        return None
    results = getattr(x, "layouts", None)
    return results if results is not None and results.origin == _origin(x) else None


def _origin(x: Tensor) -> tuple[int, bool] | None:
    """The stream of work on x, and whether it is being recorded as a CUDA graph."""
    if not x.is_cuda:
        return None
    return torch.cuda.current_stream(x.device).cuda_stream, torch.cuda.is_current_stream_capturing()

"""Tensors that depend on sizes alone: made once, then read by all layers and steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from loglinear.kernels.torch.recording import is_traced

T = TypeVar("T")
MOST = 256  # results; none is dropped, because a CUDA graph may read it at any time
_results: dict[Any, Any] = {}


def kept(make: Callable[..., T], like: Tensor, *choices: Any) -> T | None:
    """Return `make(*choices, like.device)` from the first call with these choices, or None where none may be kept.

    A trace or transform owns the tensors that are made in it. So does a CUDA graph that is being captured, but it may
    read those that were made before.
    """
    device = like.device
    if type(like) is not Tensor or device.type not in ("cpu", "cuda") or is_traced():
        return None
    key = (make, device, *choices)
    found = _results.get(key)
    if found is None and len(_results) < MOST and not _is_captured(device):
        with torch.inference_mode(False), torch.no_grad():
            found = make(*choices, device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # once; later calls may come from other streams
        _results[key] = found
    return found


def _is_captured(device: torch.device) -> bool:
    """Return True if work on this device goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

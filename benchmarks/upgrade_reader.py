"""A model that reads and writes tokens with a cache of transformers, and the time and memory that it takes."""

# B batch, T time
from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from benchmarks.upgrade_models import new_cache

COMPARED = 64  # last tokens of a prefill, whose logits are compared


class Reader:
    """A model that reads and writes tokens with a cache of transformers.

    Args:
        model: The model.
        cache_name: The argument of its forward pass that takes the cache.
        weight_bytes: The bytes of its parameters, which its peak includes. Other models may be in memory, too.
    """

    def __init__(self, model: PreTrainedModel, cache_name: str, weight_bytes: int = 0) -> None:
        self.model, self.cache_name = model, cache_name
        self.on_gpu = model.device.type == "cuda"
        self.others = torch.cuda.memory_allocated() - weight_bytes if self.on_gpu else 0

    def prefill(self, T: int) -> tuple[Tensor, Cache]:
        """Return the last tokens' logits [64, vocabulary] after T tokens, and the cache."""
        tokens = torch.randint(3, 200, (1, T), generator=torch.Generator().manual_seed(1)).to(self.model.device)
        cache = new_cache(self.model)
        return self._forward(tokens, cache)[0], cache

    def decode(self, token: Tensor, cache: Cache, steps: int) -> Tensor:
        """Return the next token [B, 1] after `steps` greedy ones. The CPU does not wait for them."""
        for _ in range(steps):
            token = self._forward(token, cache)[:, -1].argmax(-1, keepdim=True)
        return token

    def _forward(self, tokens: Tensor, cache: Cache) -> Tensor:
        return self.model(tokens, **{self.cache_name: cache, "use_cache": True, "logits_to_keep": COMPARED}).logits

    def seconds(self, run: Callable[[], Any]) -> tuple[float, Any]:
        """Return the wall time of a call, until the device is done, and its result."""
        self._wait()
        start = time.perf_counter()
        result = run()
        self._wait()
        return time.perf_counter() - start, result

    def device_seconds(self, token: Tensor, cache: Cache, steps: int) -> float:
        """Return the time that a GPU spends in the kernels of `steps` of decoding."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.decode(token, cache, steps)
            self._wait()
        return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6

    def reset_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, int]:
        """Return the largest number of allocated bytes, weights included; nothing on a CPU."""
        return {"peak_bytes": torch.cuda.max_memory_allocated() - self.others} if self.on_gpu else {}

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

"""FSDP2 through accelerate, also for CPU processes, and its sharded checkpoints in any number of processes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    load_fsdp_model,
    load_fsdp_optimizer,
    parse_flag_from_env,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer

from loglinear.runs.checkpoints import is_sharded

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SHARDS = partial(FullyShardedDataParallelPlugin, fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")


class ShardedTrainer(Trainer):
    """A base class for any Trainer, for models that accelerate shards with FSDP2.

    A checkpoint holds the shards of the weights and of the optimiser (torch.distributed.checkpoint) and, because every
    other program reads it, the gathered weights as model.safetensors. One process, DistributedDataParallel or FSDP2
    with any number of processes resumes from it.
    """

    is_fsdp_enabled: bool

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator. Raises ValueError for a configuration of FSDP that this class does not support.

        accelerate ignores FSDP for CPU processes, which torch can shard like GPUs. Its mixed precision would also round
        the loss, the residual stream and the values of heads to 16 bits. So weights are gathered in float32, and
        autocast decides what is multiplied in 16 bits, as without FSDP.
        """
        super().create_accelerator_and_postprocess()
        state: Any = self.accelerator.state
        if parse_flag_from_env("ACCELERATE_USE_FSDP") and not self.is_fsdp_enabled:
            if state.distributed_type != DistributedType.MULTI_CPU:
                raise ValueError("FSDP needs processes that accelerate launch or torchrun started, got one alone")
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled:
            plugin = state.fsdp_plugin
            for name, expected in (("fsdp_version", 2), ("state_dict_type", "SHARDED_STATE_DICT")):
                found = getattr(plugin, name)
                if str(expected) not in str(found):
                    raise ValueError(f"the configuration of accelerate must have {name}: {expected}, got {found}")
            plugin.mixed_precision_policy = MixedPrecisionPolicy()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Return accelerate's autocast for a sharded model, which accelerate does not wrap in it."""
        if self.is_fsdp_enabled:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(cache_enabled)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model with all its weights, also if they are sharded. All processes must call it."""
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        assert isinstance(self.model, nn.Module)
        weights = get_model_state_dict(self.model, options=WHOLE)  # on the first process; empty on the others
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir or ".", state_dict=weights)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._joins(resume_from_checkpoint):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        with _alone():
            load_fsdp_model(_SHARDS(), self.accelerator, self.model if model is None else model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._joins(checkpoint):
            return super()._load_optimizer_and_scheduler(checkpoint)
        with _alone():
            load_fsdp_optimizer(_SHARDS(), self.accelerator, self.optimizer, self.model, checkpoint)
        assert self.lr_scheduler is not None
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _joins(self, checkpoint: str) -> bool:
        """Return True for shards that a process with the whole model loads; ValueError for FSDP2 without shards."""
        sharded = is_sharded(Path(checkpoint))
        if self.is_fsdp_enabled and not sharded:
            raise ValueError("they are not sharded, and FSDP2 resumes from shards alone")
        return sharded and not self.is_fsdp_enabled


@contextmanager
def _alone() -> Iterator[None]:
    """Silence torch's note that one process alone loads all shards."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield

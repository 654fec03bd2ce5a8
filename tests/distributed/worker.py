"""One of two processes: trains every model sharded and replicated, and leaves what it found in a folder."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer
from transformers.distributed.configuration_utils import DistributedConfig

from loglinear.models import LogLinearForCausalLM
from loglinear.variants import HeadBias
from tests.distributed.steps import DTYPES, RANKS, batches, mean_loss, optimizer_of

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: LogLinearForCausalLM) -> LogLinearForCausalLM:
    """As documented: float32 modules and blocks are units, and the rest is one."""
    for module in model.modules():
        if isinstance(module, HeadBias) and list(module.parameters()):
            fully_shard(module)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return model


def train(model: nn.Module) -> list[float]:
    """The losses of all ranks' batches, step by step."""
    optimizer, losses = optimizer_of(model), []
    for batch in batches(dist.get_rank()):
        loss = mean_loss(model, *batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        both = loss.detach().clone()
        dist.all_reduce(both)
        losses.append(float(both) / 2)
    return losses


def sharded_by_torch(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    model = shard(LogLinearForCausalLM.from_pretrained(folder, dtype=dtype))
    return model, lambda: get_model_state_dict(model, options=FULL)


def sharded_by_transformers(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    config = DistributedConfig(fsdp_size=2)
    model = LogLinearForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=config)

    def saved() -> dict[str, Tensor]:
        model.save_pretrained(folder / f"saved_{dtype}")
        dist.barrier()
        return LogLinearForCausalLM.from_pretrained(folder / f"saved_{dtype}").state_dict()

    return model, saved


def replicated(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    model = LogLinearForCausalLM.from_pretrained(folder, dtype=dtype)
    return DistributedDataParallel(model), model.state_dict


WAYS = {"fully_shard": sharded_by_torch, "transformers": sharded_by_transformers, "ddp": replicated}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, meeting = int(os.environ["RANK"]), f"file://{folder}/meeting"
    dist.init_process_group("gloo", meeting, timedelta(seconds=60), world_size=RANKS, rank=rank)
    found = {}
    for model_folder in sorted(path for path in folder.iterdir() if path.is_dir()):
        for way, make in WAYS.items():
            for dtype in DTYPES if way != "ddp" else DTYPES[:1]:
                model, state_dict = make(model_folder, dtype)
                decayed = Trainer.get_decay_parameter_names(None, model)
                losses = train(model)
                found[model_folder.name, way, dtype] = (decayed, losses, state_dict())
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

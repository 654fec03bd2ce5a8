"""Steps of training on slices, with parameters that torch shards or replicates."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from loglinear import parallel
from loglinear.models import LogLinearForCausalLM
from loglinear.variants import HeadBias
from tests.models.tiny_models import HYBRID, tiny_config, tokens

STEPS = 2
WAYS = {"fully_shard": 2, "ddp": 2, "fully_shard_2x2": 4}  # and the processes of each
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def make() -> LogLinearForCausalLM:
    torch.manual_seed(0)
    return LogLinearForCausalLM(tiny_config(**HYBRID, loss_chunk_size=64)).double().train()


def batch(step: int, group: int) -> tuple[Tensor, tuple[int, ...]]:
    """Return the packed documents of a step, other ones for each group of data-parallel ranks."""
    return tokens(1, 43, seed=10 * step + group), ((0, 30, 43), (0, 11, 43))[group]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5)


def one_process(groups: int) -> dict[str, Tensor]:
    """Return the losses of all steps, and the weights after them."""
    model = make()
    optimizer, losses = optimizer_of(model), []
    for step in range(STEPS):
        batches = [batch(step, group) for group in range(groups)]
        loss = torch.stack([model(x, labels=x, cu_seqlens=torch.tensor(d)).loss for x, d in batches]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), **model.state_dict()}


def shard_parameters(model: LogLinearForCausalLM, mesh: Any) -> None:
    """Float32 modules and blocks are units, and the rest is one."""
    for module in model.modules():
        if isinstance(module, HeadBias) and list(module.parameters()):
            fully_shard(module, mesh=mesh)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def several_processes(way: str) -> dict[str, Tensor]:
    """Return the same from all processes: sequences are cut over "cp", and each rank of "dp" has its own documents.

    Parameters are sharded over "cp" alone, or over "dp" and replicated over "cp".
    """
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("cp", "dp"))
    model = make()
    trained: nn.Module = model
    if way == "ddp":
        trained = DistributedDataParallel(model, process_group=mesh["cp"].get_group())
    else:
        shard_parameters(model, mesh["cp"] if ranks == 2 else mesh)
    optimizer, losses = optimizer_of(trained), []
    for step in range(STEPS):
        ids, documents = batch(step, mesh["dp"].get_local_rank())
        loss = trained(**parallel.shard(model.config, mesh["cp"], ids, ids, cu_seqlens=documents)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total / ranks)
    return {"losses": torch.stack(losses), **get_model_state_dict(model, options=FULL)}

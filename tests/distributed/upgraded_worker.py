"""One of two processes that train an upgraded model, sharded in every way; the first leaves what it found."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import loglinear
from loglinear.variants import HeadBias
from tests.upgrades.tiny import tokens

DTYPES = (torch.float32, torch.bfloat16)
WAYS = ("torch", "transformers", "replicated")


def steps(model: nn.Module, rows: slice) -> list[float]:
    """The losses of three steps on these rows of each batch of four."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(3):
        ids = tokens(4, 20, seed=step)[rows]
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def spread(folder: Path, way: str, dtype: torch.dtype) -> nn.Module:
    if way == "transformers":
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, distributed_config=DistributedConfig(fsdp_size=2)
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if way == "replicated":
        return DistributedDataParallel(model)
    for module in model.modules():
        if isinstance(module, HeadBias) and list(module.parameters()):
            fully_shard(module)
    for block in model.base_model.layers:
        fully_shard(block)
    fully_shard(model)
    return model


def main(folder: Path) -> None:
    rank, found = int(os.environ["RANK"]), {}
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    for way in WAYS:
        for dtype in DTYPES:
            model = spread(folder, way, dtype)
            losses = torch.tensor(steps(model, slice(2 * rank, 2 * rank + 2)))
            dist.all_reduce(losses)
            weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            new = {name.removeprefix("module.") for name in loglinear.new_parameters(model)}
            found[way, dtype] = (losses / 2).tolist(), {name: w for name, w in weights.items() if name in new}
            loglinear.save_upgrade(model, folder / f"{way}-{dtype}.safetensors")
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

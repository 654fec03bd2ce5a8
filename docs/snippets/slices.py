import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from loglinear import parallel
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.variants import HeadBias

for name, value in dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0").items():
    os.environ.setdefault(name, value)  # torchrun sets them; alone, this is one process
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("cp", "dp"))
torch.manual_seed(0)
sizes = dict(hidden_size=64, num_hidden_layers=1, num_heads=2, key_dim=16, head_dim=32, num_levels=8)
model = LogLinearForCausalLM(LogLinearConfig(**sizes)).train()

for module in model.modules():
    if isinstance(module, HeadBias) and list(module.parameters()):
        fully_shard(module, mesh=mesh)  # replicated over "cp", sharded over "dp"
for block in model.model.layers:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)

ids = torch.randint(0, 256, (1, 1000))  # the whole sequence, equal on all ranks of "cp"
batch = parallel.shard(model.config, mesh["cp"], ids, labels=ids)
loss = model(**batch).loss  # of the whole sequence, equal on all ranks of "cp"
loss.backward()
dist.destroy_process_group()

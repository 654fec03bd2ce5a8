import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.variants import HeadBias

for name, value in dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0").items():
    os.environ.setdefault(name, value)  # torchrun sets them; alone, this is one process
dist.init_process_group("gloo")
torch.manual_seed(0)
sizes = dict(hidden_size=64, num_hidden_layers=1, num_heads=2, key_dim=16, head_dim=32, num_levels=8)
model = LogLinearForCausalLM(LogLinearConfig(**sizes))

for module in model.modules():
    if isinstance(module, HeadBias) and list(module.parameters()):
        fully_shard(module)  # float32, also in a 16-bit model
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)

ids = torch.randint(0, 256, (2, 64))
model(input_ids=ids, labels=ids).loss.backward()
dist.destroy_process_group()

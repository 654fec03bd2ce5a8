from copy import deepcopy

import torch
from accelerate import cpu_offload

from loglinear.models import LogLinearConfig, LogLinearForCausalLM

sizes = dict(hidden_size=64, num_hidden_layers=1, num_heads=2, key_dim=16, head_dim=32, num_levels=8)
model = LogLinearForCausalLM(LogLinearConfig(**sizes)).eval()
offloaded = cpu_offload(deepcopy(model))  # or from_pretrained(folder, device_map=..., offload_folder=...)
ids = torch.randint(0, 256, (2, 64))
print(torch.equal(offloaded(ids).logits, model(ids).logits))  # True

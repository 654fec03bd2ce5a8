import torch
from peft import LoraConfig, get_peft_model

from loglinear.models import LogLinearConfig, LogLinearForCausalLM

sizes = dict(hidden_size=64, num_hidden_layers=1, num_heads=2, key_dim=16, head_dim=32, num_levels=8)
model = LogLinearForCausalLM(LogLinearConfig(**sizes))
ids = torch.randint(0, 256, (2, 64))

adapted = get_peft_model(model, LoraConfig(target_modules=["level_scales.proj"], r=4))  # or "all-linear"
adapted(input_ids=ids, labels=ids).loss.backward()
adapted.print_trainable_parameters()
merged = adapted.merge_and_unload()  # an ordinary LogLinearForCausalLM again

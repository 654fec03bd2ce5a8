import torch

from loglinear.models import LogLinearConfig, LogLinearForCausalLM

sizes = dict(hidden_size=64, num_hidden_layers=1, num_heads=2, key_dim=16, head_dim=32, num_levels=8)
model = LogLinearForCausalLM(LogLinearConfig(**sizes)).double().eval()
first, second = torch.randint(0, 264, (1, 50)), torch.randint(0, 264, (1, 30))

packed = torch.cat([first, second], dim=1)
boundaries = torch.tensor([0, 50, 80])
logits = model(packed, cu_seqlens=boundaries).logits
print((logits[:, 50:] - model(second).logits).abs().max())  # about 1e-16: as if it were alone

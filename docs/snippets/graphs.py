import torch

from loglinear.models import LogLinearConfig, LogLinearForCausalLM

sizes = dict(hidden_size=64, num_hidden_layers=1, num_heads=2, key_dim=16, head_dim=32, num_levels=8)
model = LogLinearForCausalLM(LogLinearConfig(**sizes)).eval()
ids = torch.randint(0, 256, (2, 64))
arguments = dict(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # leave `backend` out for the default compiler
exported = torch.export.export(model, (), arguments, strict=False).module()
expected = model(**arguments).logits
for one in (compiled, exported):
    print((one(**arguments).logits - expected).abs().max().item())

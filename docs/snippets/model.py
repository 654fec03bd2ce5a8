import torch

from loglinear.models import LogLinearConfig, LogLinearForCausalLM

config = LogLinearConfig(
    vocab_size=264, hidden_size=128, num_hidden_layers=2, variant="gated_delta_net",
    num_levels=11, num_heads=2, key_dim=32, head_dim=64,
)  # fmt: skip
model = LogLinearForCausalLM(config)
tokens = torch.randint(0, 264, (2, 100))

loss = model(input_ids=tokens, labels=tokens).loss  # labels are shifted inside
loss.backward()
text = model.eval().generate(tokens[:, :10], max_new_tokens=20, do_sample=False)
print(loss.item(), text.shape)

import torch

from loglinear import DecodeState, log_linear_attention, log_linear_attention_step

B, T, G, H, K, V, L = 2, 100, 1, 4, 32, 32, 8
prompt = {
    "q": torch.randn(B, T, G, K) / 6,
    "k": torch.randn(B, T, G, K),
    "v": torch.randn(B, T, H, V),
    "log_decay": -0.1 * torch.rand(B, T, H),
    "level_scales": torch.rand(B, T, H, L),
}
_, state = log_linear_attention(**prompt, output_final_state=True)
state = DecodeState.of(state)  # allocated once; steps change it in place and carry no gradients
for t in range(3):
    token = {name: x[:, t] for name, x in prompt.items()}  # one token for each row: no time axis
    out = log_linear_attention_step(**token, state=state)
print(out.shape, state.fenwick.position)

import torch

from loglinear import log_linear_attention

# batch, time, query/key groups, heads, key, value, levels (11 levels distinguish 1,024 tokens)
B, T, G, H, K, V, L = 1, 1000, 1, 4, 64, 64, 11
q, k = torch.randn(B, T, G, K) / 8, torch.randn(B, T, G, K)  # q times 1 / sqrt(K)
v, log_decay = torch.randn(B, T, H, V), -0.1 * torch.rand(B, T, H)
# lambda: how much each token reads of each level
level_scales = torch.rand(B, T, H, L, requires_grad=True)

inputs = q, k, v, log_decay, level_scales
out, state = log_linear_attention(*inputs, output_final_state=True)
out.square().mean().backward()
print(out.shape, level_scales.grad.shape, state.position)

# The same sequences, 1,000 tokens more: hand the state back.
more, state = log_linear_attention(*inputs, initial_state=state.detach(), output_final_state=True)
print(state.position)

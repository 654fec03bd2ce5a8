import torch

from loglinear import log_linear_attention

B, T, G, H, K, V, L = 1, 1000, 1, 4, 64, 64, 11  # batch, time, q/k groups, heads, key, value, levels
q, k = torch.randn(B, T, G, K) / 8, torch.randn(B, T, G, K)
v, log_decay = torch.randn(B, T, H, V), -0.1 * torch.rand(B, T, H)
level_scales = torch.rand(B, T, H, L, requires_grad=True)  # lambda: how much each token reads of each level

out, state = log_linear_attention(q, k, v, log_decay, level_scales, output_final_state=True)
out.square().mean().backward()
print(out.shape, level_scales.grad.shape, state.position)

# %% [markdown]
# # One operator
#
# **An operator takes q, k, v, log decays and level scales, and returns outputs and a state.** This notebook continues a
# sequence in pieces, decodes it token by token, packs two sequences, and computes gradients.

# %%
import torch

from loglinear.ops import DecodeState, log_linear_attention, log_linear_attention_step, log_linear_delta_rule

torch.manual_seed(0)
B, T, G, H, K, V, L = 1, 70, 1, 2, 8, 8, 8


def inputs(T: int) -> dict[str, torch.Tensor]:
    return {
        "q": torch.randn(B, T, G, K, dtype=torch.float64),
        "k": torch.randn(B, T, G, K, dtype=torch.float64) / 3,
        "v": torch.randn(B, T, H, V, dtype=torch.float64),
        "log_decay": -0.1 * torch.rand(B, T, H, dtype=torch.float64),
        "level_scales": torch.rand(B, T, H, L, dtype=torch.float64),
    }


x = inputs(T)
whole, _ = log_linear_attention(**x)

# %% [markdown]
# ## In pieces
#
# A state continues the sequence at any position:

# %%
state, pieces = None, []
for start, end in ((0, 1), (1, 40), (40, 70)):
    piece = {name: value[:, start:end] for name, value in x.items()}
    out, state = log_linear_attention(**piece, initial_state=state, output_final_state=True)
    pieces.append(out)
assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-12)
print(state.position, [list(part.shape) for part in state if part is not None])

# %% [markdown]
# ## Token by token
#
# `DecodeState` is the same state at a fixed address in memory. A step takes one token per row, without the time axis:

# %%
first = {name: value[:, :40] for name, value in x.items()}
_, state = log_linear_attention(**first, output_final_state=True)
decode = DecodeState.of(state)
for t in range(40, 70):
    token = {name: value[:, t] for name, value in x.items()}
    out = log_linear_attention_step(**token, state=decode)
    assert torch.allclose(out, whole[:, t], atol=1e-12)

# %% [markdown]
# ## Packed
#
# One row holds two sequences. Each has its own tree:

# %%
ends = torch.tensor([0, 30, 70])
packed, _ = log_linear_attention(**x, cu_seqlens=ends)
alone, _ = log_linear_attention(**{name: value[:, 30:] for name, value in x.items()})
assert torch.allclose(packed[:, 30:], alone, atol=1e-12)

# %% [markdown]
# ## The delta rule, and gradients
#
# The delta rule takes a write strength beta. `l2_normalize` scales its queries and keys to length 1:

# %%
beta = torch.rand(B, T, H, dtype=torch.float64, requires_grad=True)
out, _ = log_linear_delta_rule(x["q"], x["k"], x["v"], x["log_decay"], beta, x["level_scales"], l2_normalize=True)
out.square().mean().backward()
print(beta.grad.norm())

# %% [markdown]
# # What lambda learns
#
# **Lambda starts at exactly 1, so a new model equals its linear model. Training moves the levels apart.** This notebook
# trains a model on a task that needs one particular distance. It shows lambda by level before and after training.

# %%
import matplotlib.pyplot as plt
import torch

from loglinear.layers import LevelScales
from loglinear.models import LogLinearConfig, LogLinearForCausalLM

torch.manual_seed(0)
torch.set_num_threads(1)
model = LogLinearForCausalLM(
    LogLinearConfig(
        vocab_size=32, hidden_size=64, num_hidden_layers=1, num_heads=2, key_dim=32, head_dim=32, num_levels=8
    )
)

# %% [markdown]
# ## The task
#
# Each sequence is 32 random tokens, then the same 32 tokens again. The second half can be copied. The first cannot be
# predicted.


# %%
def batch(rows: int = 16, half: int = 32) -> torch.Tensor:
    first = torch.randint(0, 32, (rows, half))
    return torch.cat([first, first], dim=1)


def lambdas(tokens: torch.Tensor) -> torch.Tensor:
    """Mean lambda of each level over tokens and heads [L]."""
    seen = []
    layer = next(module for module in model.modules() if isinstance(module, LevelScales))
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(out.mean((0, 1, 2))))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return seen[0]


before = lambdas(batch())
assert torch.equal(before, torch.ones_like(before))

# %% [markdown]
# ## Training

# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(40):
    tokens = batch()
    loss = model(input_ids=tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
after = lambdas(batch())
print("lambda by level:", [round(value, 2) for value in after.tolist()])

# %%
figure, axes = plt.subplots(figsize=(6, 3))
axes.bar(range(len(after)), after)
axes.axhline(1, color="grey", ls=":")
axes.set(xlabel="level", ylabel="mean lambda", title="Levels move apart from 1")
assert (after - 1).abs().max() > 0.01

# %% [markdown]
# Lambda depends on the reading token alone, so it cannot know which bucket holds a particular key. The consequences
# are measured in [Results](../../results/).

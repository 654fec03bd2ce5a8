# %% [markdown]
# # The tree by hand
#
# **One line partitions the past into buckets: `level(t, s) = bit_length(t XOR s)`.** This notebook prints the buckets,
# builds the states of one sequence by hand, and compares the result with the library.

# %%
import torch

from loglinear.fenwick import level, merge_height, num_levels, walk

for t in (5, 6, 7, 8):
    print(t, [level(t, s) for s in range(t + 1)])

# %% [markdown]
# Position 8 is 1000 in binary and reads all earlier tokens from one bucket. Position 7 is 111 and reads three buckets
# and itself.
#
# ## One state per level
#
# At position t the levels up to `merge_height(t)` merge into the next one. Then the token's transition multiplies every
# state, and the new key-value pair enters level 0.

# %%
torch.manual_seed(0)
T, K, V = 13, 4, 3
q, k, v = (torch.randn(T, width, dtype=torch.float64) for width in (K, K, V))
log_decay = -0.2 * torch.rand(T, dtype=torch.float64)
lam = torch.rand(T, num_levels(T), dtype=torch.float64)

states = torch.zeros(num_levels(T), K, V, dtype=torch.float64)
outputs = []
for t in range(T):
    if t:
        height = merge_height(t)
        states[height + 1] += states[: height + 1].sum(0)
        states[: height + 1] = 0
    states *= log_decay[t].exp()
    states[0] = torch.outer(k[t], v[t])
    outputs.append(torch.einsum("l,k,lkv->v", lam[t], q[t], states))
by_hand = torch.stack(outputs)

# %% [markdown]
# The library gives the same numbers. Its tensors have axes for batch, time, heads and levels:

# %%
from loglinear.ops import log_linear_attention  # noqa: E402

heads = (x[None, :, None] for x in (q, k, v))
out, state = log_linear_attention(*heads, log_decay[None, :, None], lam[None, :, None], chunk_size=4)
error = (out[0, :, 0] - by_hand).abs().max()
print(f"largest difference {float(error):.1e}")
assert error < 1e-12

# %% [markdown]
# ## With every lambda 1 it is the linear model
#
# The sum of all levels is the linear model's state, for any partition into buckets.

# %%
ones = torch.ones_like(lam)
heads = [x[None, :, None] for x in (q, k, v)]
neutral, _ = log_linear_attention(*heads, log_decay[None, :, None], ones[None, :, None], chunk_size=4)
one_level, _ = log_linear_attention(*heads, log_decay[None, :, None], ones[None, :, None, :1], chunk_size=4)
assert torch.allclose(neutral, one_level, atol=1e-12)

# %% [markdown]
# ## The walk
#
# The algorithm keeps one state per chunk. Chunk 13 reads three blocks, nearest first. `walk` returns each block's end
# (exclusive) and the logarithm of its size:

# %%
print(walk(13))

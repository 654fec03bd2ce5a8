# %% [markdown]
# # Train a tiny model
#
# **A log-linear model is an ordinary Hugging Face model.** This notebook trains one for a few steps on a module of
# Python's standard library and generates text. The model learns little in a minute. `make demo` trains longer.

# %%
import tempfile

import torch

from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.training import ByteTokenizer

torch.manual_seed(0)
torch.set_num_threads(1)
tokenizer = ByteTokenizer()
config = LogLinearConfig(
    vocab_size=264, hidden_size=96, num_hidden_layers=2, num_heads=2, key_dim=32, head_dim=64, num_levels=9
)
model = LogLinearForCausalLM(config)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# ## Data
#
# The text of one module, cut into windows of 256 bytes:

# %%
import argparse  # noqa: E402
import inspect  # noqa: E402

text = inspect.getsource(argparse)
ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
windows = ids[: len(ids) // 256 * 256].view(-1, 256)
print(windows.shape)

# %% [markdown]
# ## Training
#
# `labels` are the inputs: the model shifts them.

# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
losses = []
for _ in range(20):
    batch = windows[torch.randint(len(windows), (4,))]
    loss = model(input_ids=batch, labels=batch).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"nats per byte: {losses[0]:.2f} at the start, {losses[-1]:.2f} after {len(losses)} steps")
assert losses[-1] < losses[0]

# %% [markdown]
# ## Generation, saving, loading

# %%
prompt = tokenizer("def ", return_tensors="pt", add_special_tokens=False)
model.eval()
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40, do_sample=True)[0]))
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = LogLinearForCausalLM.from_pretrained(folder)
with torch.no_grad():
    assert torch.equal(again(windows[:1]).logits, model(windows[:1]).logits)

# %% [markdown]
# ## The linear model
#
# One level is the linear model of the same variant. The code is the same, and the parameters are fewer:

# %%
linear = LogLinearForCausalLM(LogLinearConfig(**{**config.to_diff_dict(), "num_levels": 1}))
print(f"{sum(p.numel() for p in linear.parameters()):,} parameters")

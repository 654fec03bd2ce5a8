import torch

from loglinear.layers import Mixer
from loglinear.variants import HeadSizes

heads = HeadSizes(num_heads=4, num_groups=1, key_dim=64, head_dim=64)
mixer = Mixer(256, heads, variant="mamba2", num_levels=11)
x = torch.randn(2, 300, 256)
y, state = mixer(x, return_state=True)
more, state = mixer(torch.randn(2, 5, 256), state=state, return_state=True)  # the same sequences, continued
print(y.shape, more.shape)

"""The feed-forward layer."""

from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """The SwiGLU layer: [B, T, D] -> [B, T, D].

        y = down(silu(gate(x)) * up(x))

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, equation 6.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

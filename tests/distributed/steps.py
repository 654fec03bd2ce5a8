"""The steps that one process and two must agree on."""

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16)
RANKS = 2


def batches(rank: int) -> list[tuple[Tensor, Tensor]]:
    """Tokens and mask of each step. The last rank has only padding in the second step, one token in the third."""
    made = []
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + rank)
        tokens, mask = torch.randint(3, 40, (2, 9), generator=generator), torch.ones(2, 9, dtype=torch.long)
        mask[1, :4] = 0
        if rank == RANKS - 1 and step in (1, 2):
            mask[:] = 0
            mask[0, 3] = step - 1
        made.append((tokens, mask))
    return made


def mean_loss(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    return model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5)

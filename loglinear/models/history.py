# B batch, T time (new columns), S columns so far
"""A fingerprint of the columns that a cache has seen: later arguments that contradict it are refused."""

import torch
from torch import Tensor

from loglinear.ops.state import constants

FACTOR = 6364136223846793005  # Knuth's multiplier for products modulo 2^64, which is how int64 multiplies
PADDING, TOKEN = 1, 2
OTHER_MASK = (
    "attention_mask contradicts past_key_values, whose states cannot go back: its columns so far must be "
    "0 where the cache saw padding or a row that had ended, and 1 elsewhere"
)


class History:
    """One number for the mask and one for the text of each row, whatever their length.

        h <- FACTOR * h + value    for each column; value: token or padding, and the token's id

    Two histories that differ have the same number with a chance of about 2^-64. Nothing here waits for a device.
    """

    def __init__(self, static: bool = False) -> None:
        self.static = static
        self.numbers: Tensor | None = None  # [2, B]: mask, text
        self.knows_text = True  # False: some of it came as embeddings
        self.knows_mask = True  # False: columns were taken away

    def extend(self, rows: int, time: int, real_BT: Tensor | None, ids_BT: Tensor | None, device: torch.device) -> None:
        """Note T new columns; without a mask all are tokens, without ids the text is unknown from now on."""
        before = torch.zeros(2, rows, dtype=torch.int64, device=device) if self.numbers is None else self.numbers
        if ids_BT is None:
            self.knows_text = False
            ids_BT = before.new_zeros(rows, time)
        after = _extended(before, real_BT, ids_BT)
        if not self.static:
            self.numbers = after
        elif self.numbers is not None:
            self.numbers.copy_(after)
        else:
            with constants():
                self.numbers = torch.empty_like(after)
            self.numbers.copy_(after)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.numbers)

    def agrees(self, real_BS: Tensor, ids_BS: Tensor | None = None) -> Tensor:
        """Which rows [B] were seen with this mask, and with these ids where both are known."""
        assert self.numbers is not None
        if not self.knows_mask:
            return torch.ones_like(self.numbers[0], dtype=torch.bool)
        compares_text = ids_BS is not None and self.knows_text
        ids = ids_BS if ids_BS is not None else torch.zeros_like(real_BS, dtype=torch.int64)
        equal = _extended(torch.zeros_like(self.numbers), real_BS, ids) == self.numbers
        return equal.all(0) if compares_text else equal[0]

    def forget(self) -> None:
        """Agree with everything from now on: what is left of the columns has no number."""
        self.knows_mask = self.knows_text = False

    def reset(self) -> None:
        self.knows_text = self.knows_mask = True
        if self.static and self.numbers is not None:  # the memory stays: graphs point at it
            self.numbers.zero_()
        else:
            self.numbers = None

    def index_select(self, rows: Tensor) -> None:
        """Keep these rows, in their order."""
        if self.numbers is not None:
            self.numbers = self.numbers.index_select(1, rows.to(self.numbers.device))

    def repeat_interleave(self, repeats: int) -> None:
        if self.numbers is not None:
            self.numbers = self.numbers.repeat_interleave(repeats, dim=1)

    def reorder(self, rows: Tensor) -> None:
        """As many rows as before, in the same memory."""
        if self.numbers is not None:
            reordered = self.numbers.index_select(1, rows.to(self.numbers.device))
            self.numbers = self.numbers.copy_(reordered) if self.static else reordered


def _extended(numbers: Tensor, real_BT: Tensor | None, ids_BT: Tensor) -> Tensor:
    ids_BT = ids_BT.long() + TOKEN
    if real_BT is None:
        real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    values = torch.stack([torch.where(real_BT, TOKEN, PADDING), torch.where(real_BT, ids_BT, PADDING)])
    if values.shape[2] == 1:
        return numbers * FACTOR + values[:, :, 0]
    powers = torch.full((values.shape[2],), FACTOR, dtype=torch.int64, device=values.device).cumprod(0)
    weights = torch.cat([torch.ones_like(powers[:1]), powers[:-1]]).flip(0)
    return numbers * powers[-1] + (values * weights).sum(2)

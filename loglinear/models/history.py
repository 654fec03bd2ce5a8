# B batch, T time (new columns), S columns so far
"""The fingerprint of the columns that a cache has seen, which detects contradicting arguments later."""

import torch
from torch import Tensor

from loglinear.ops.state import constants

FACTOR = 6364136223846793005  # Knuth's multiplier for products modulo 2^64, which is how int64 multiplies
PADDING, TOKEN = 1, 2
OTHER_MASK = (
    "attention_mask contradicts past_key_values, whose states cannot go back: its past columns must be "
    "0 where the cache saw padding or an ended row, and 1 elsewhere"
)


class History:
    """Two numbers for each row, one of its mask and one of its token ids, whatever their length.

        h <- FACTOR * h + value    for each column; value: token or padding, and the token's id

    Two different histories have the same number with a probability of about 2^-64. The CPU never waits for a device.
    """

    def __init__(self, static: bool = False) -> None:
        self.static = static
        self.numbers: Tensor | None = None  # [2, B]: mask, ids
        self.knows_text = True  # False: some tokens came as embeddings
        self.knows_mask = True  # False: columns were removed

    def extend(self, rows: int, time: int, real_BT: Tensor | None, ids_BT: Tensor | None, device: torch.device) -> None:
        """Note T new columns; without a mask all are tokens, and without ids the token ids become unknown."""
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
        """Return True [B] for rows that were seen with this mask and, if both are known, with these ids."""
        assert self.numbers is not None
        if not self.knows_mask:
            return torch.ones_like(self.numbers[0], dtype=torch.bool)
        compares_text = ids_BS is not None and self.knows_text
        ids = ids_BS if ids_BS is not None else torch.zeros_like(real_BS, dtype=torch.int64)
        equal = _extended(torch.zeros_like(self.numbers), real_BS, ids) == self.numbers
        return equal.all(0) if compares_text else equal[0]

    def forget(self) -> None:
        """Agree with everything after this call, because the remaining columns have no number."""
        self.knows_mask = self.knows_text = False

    def reset(self) -> None:
        self.knows_text = self.knows_mask = True
        if self.static and self.numbers is not None:  # graphs point at this memory
            self.numbers.zero_()
        else:
            self.numbers = None

    def index_select(self, rows: Tensor) -> None:
        """Keep these rows [n], in their order."""
        if self.numbers is not None:
            self.numbers = self.numbers.index_select(1, rows.to(self.numbers.device))

    def repeat_interleave(self, repeats: int) -> None:
        if self.numbers is not None:
            self.numbers = self.numbers.repeat_interleave(repeats, dim=1)

    def reorder(self, rows: Tensor) -> None:
        """Reorder the rows [B]; a static history keeps its memory."""
        if self.numbers is not None:
            reordered = self.numbers.index_select(1, rows.to(self.numbers.device))
            self.numbers = self.numbers.copy_(reordered) if self.static else reordered


class Seen:
    """The base of what `TokenPlaces` asks about the columns that a cache has seen."""

    history: History
    columns_limit: int | None
    is_whole: bool  # False: some parts have changed and others have not

    @property
    def rows(self) -> int | None:
        """The number of sequences; None before the first token."""
        return None if self.history.numbers is None else self.history.numbers.shape[1]

    @property
    def has_states(self) -> bool:
        """True if all linear layers have seen a token."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        """Return the number of columns; a tensor for a static cache."""
        raise NotImplementedError

    def require_whole(self) -> None:
        """Raise ValueError if an earlier call raised an error while it changed the cache."""
        if not self.is_whole:
            raise ValueError(
                "past_key_values is not whole, because an earlier call with it raised an error midway: "
                "start with a new cache or call its reset()"
            )

    def check_past(self, real_BS: Tensor, ids_BS: Tensor | None = None) -> None:
        """Raise ValueError unless the cache has seen this mask [B, S] and, at its tokens, these ids [B, S]."""
        if not bool(self.history.agrees(real_BS).all()):
            raise ValueError(OTHER_MASK)
        if ids_BS is not None and not bool(self.history.agrees(real_BS, ids_BS).all()):
            row = int(self.history.agrees(real_BS, ids_BS).int().argmin())
            raise ValueError(f"input_ids must begin with the tokens that past_key_values has seen, row {row} does not")


def _extended(numbers: Tensor, real_BT: Tensor | None, ids_BT: Tensor) -> Tensor:
    """Return the numbers [2, B] after T new columns."""
    ids_BT = ids_BT.long() + TOKEN
    if real_BT is None:
        real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    values = torch.stack([torch.where(real_BT, TOKEN, PADDING), torch.where(real_BT, ids_BT, PADDING)])
    if values.shape[2] == 1:
        return numbers * FACTOR + values[:, :, 0]
    powers = torch.full((values.shape[2],), FACTOR, dtype=torch.int64, device=values.device).cumprod(0)
    weights = torch.cat([torch.ones_like(powers[:1]), powers[:-1]]).flip(0)
    return numbers * powers[-1] + (values * weights).sum(2)

# B batch, T time (new columns), S columns so far and new
"""The places of the tokens in a batch, decided once per forward pass: padding, packed documents, targets."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from loglinear.layers.slices import Slice
from loglinear.models.history import OTHER_MASK, Seen
from loglinear.models.loss import IGNORE


class TokenPlaces(NamedTuple):
    """The places of tokens: in full rows, in rows with padding (`real`) or in packed documents (`cu_seqlens`).

    The packing of the layers, their attention and rotary positions, and the targets of the loss follow from it.
    """

    rows: int
    time: int
    past: int = 0
    """Columns that the cache has seen; a tensor for a static cache."""
    is_step: bool = False
    """True for one token per row from the states of a cache, without gradients."""
    real: Tensor | None = None
    """[B, T] True at tokens, False at padding; None: all are tokens."""
    cu_seqlens: Tensor | None = None
    """[n+1] boundaries of the packed documents; None: not packed."""
    scores_mask: Tensor | None = None
    """[B or 1, H or 1, T, S] True at keys that a query attends to, or numbers added to the scores; no padding."""
    slices: Slice | None = None
    """This device's part of rows or documents that lie on several devices; None: they are whole."""

    @staticmethod
    def of(
        tokens: Tensor,
        cache: Seen | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        slices: Slice | None = None,
    ) -> "TokenPlaces":
        """Return the places of tokens [B, T, ...] (ids or embeddings) that continue a cache.

        Raises:
            ValueError: Arguments contradict each other, the shape of the tokens or the cache.
        """
        if cache is not None and not isinstance(cache, Seen):
            raise ValueError(f"past_key_values must be a LogLinearCache, got {type(cache).__name__}")
        if cache is not None:
            cache.require_whole()
        rows, time = tokens.shape[:2]
        if time == 0:
            raise ValueError("input_ids must have at least one token in each row, got none")
        if cache is not None and cache.rows not in (None, rows):
            raise ValueError(f"past_key_values holds {cache.rows} sequences, got a batch of {rows}")
        past = 0 if cache is None else cache.get_seq_length()
        is_step = time == 1 and cache is not None and cache.has_states and not torch.is_grad_enabled()
        places = TokenPlaces(rows, time, past, is_step)
        named = dict(cu_seqlens=cu_seqlens, cu_seq_lens_q=cu_seq_lens_q, cu_seq_lens_k=cu_seq_lens_k, seq_idx=seq_idx)
        if slices is not None:
            return places._sliced(slices, tokens, dict(past_key_values=cache, attention_mask=attention_mask, **named))
        boundaries = _document_boundaries(tokens, {name: value for name, value in named.items() if value is not None})
        if attention_mask is not None and attention_mask.dim() == 4:
            if boundaries is not None:
                raise ValueError("attention_mask [B, 1, T, S] and boundaries of packed documents exclude each other")
            keys = past + time if cache is None or cache.columns_limit is None else cache.columns_limit
            return places._replace(scores_mask=places._read_scores_mask(attention_mask, int(keys)))
        real = None if attention_mask is None else places._new_columns(attention_mask, cache)
        if boundaries is not None and real is not None:
            raise ValueError("attention_mask must not mark padding in a packed batch: leave the padding out")
        return places._replace(real=real, cu_seqlens=boundaries)

    def may_ask(self, x: Tensor) -> bool:
        """Return True if the CPU may wait for a value: not in a graph, and not for a device in a decode step."""
        return not torch.compiler.is_compiling() and not (self.is_step and x.device.type != "cpu")

    def require(self, condition: Tensor, message: str) -> None:
        """Raise ValueError unless the condition holds; if the CPU may not wait, the device asserts it."""
        if not self.may_ask(condition):
            torch._assert_async(condition, message)
        elif not bool(condition):
            raise ValueError(message)

    def targets(self, labels: Tensor | None, shift_labels: Tensor | None = None) -> Tensor | None:
        """Return the target [B, T] of each token, -100 where nothing is to be predicted; None without labels.

        The target is the label of the next token of the same row or document, skipping padding, or is taken from
        `shift_labels`. Padding predicts nothing. Neither padding nor the first token of a row or document is a target.
        """
        for name, given in (("labels", labels), ("shift_labels", shift_labels)):
            if given is not None:
                self._check_labels(name, given)
        if shift_labels is not None:
            return shift_labels if self.real is None else shift_labels.masked_fill(~self.real, IGNORE)
        if labels is None:
            return None
        if self.slices is not None:
            raise ValueError("labels must be None with slices: pass shift_labels, as loglinear.parallel.shard does")
        if self.real is not None:
            following = F.pad(labels, (0, 1), value=IGNORE).gather(1, _next_real(self.real))
            return following.masked_fill(~self.real, IGNORE)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        if self.cu_seqlens is not None:
            # An empty document's end names the token before it, or the row's last token: neither has a next token.
            targets = targets.index_fill(1, (self.cu_seqlens[1:].long() - 1) % self.time, IGNORE)
        return targets

    def _sliced(self, slices: Slice, tokens: Tensor, others: dict[str, object]) -> "TokenPlaces":
        """Return these places as those of a slice; ValueError for arguments that it excludes."""
        for name, value in others.items():
            if value is not None:
                raise ValueError(f"{name} must be None with slices: they have no cache, no padding and own boundaries")
        slices.check_time("input_ids", tokens)
        boundaries = slices.cu_seqlens
        return self._replace(cu_seqlens=None if boundaries is None else boundaries.to(tokens.device), slices=slices)

    def _check_labels(self, name: str, labels: Tensor) -> None:
        """Raise ValueError unless labels are integers [B, T]."""
        if not has_shape(labels, self.rows, self.time):
            raise ValueError(f"{name} must have shape [{self.rows}, {self.time}], got {list(labels.shape)}")
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"{name} must hold integers, got {labels.dtype}")

    def _new_columns(self, attention_mask: Tensor, cache: Seen | None) -> Tensor | None:
        """Return True [B, T] at new columns that are tokens; None if the CPU may read that all are."""
        widths = (self.time, self.past + self.time)
        if not any(has_shape(attention_mask, self.rows, width) for width in widths):
            raise ValueError(
                f"attention_mask must have shape [{self.rows}, {int(self.past) + self.time}] (1 token, 0 padding), "
                f"got {list(attention_mask.shape)}"
            )
        read = self._read_mask(attention_mask)
        real, past = read[:, -self.time :], read[:, : -self.time]
        if cache is not None and past.shape[1] > 0:
            self.require(cache.history.agrees(past).all(), OTHER_MASK)
        return None if self.may_ask(real) and bool(real.all()) else real

    def _read_mask(self, attention_mask: Tensor) -> Tensor:
        """Return a mask of booleans or numbers as booleans, True at tokens."""
        if attention_mask.dtype != torch.bool:
            self.require(
                ((attention_mask == 0) | (attention_mask == 1)).all(),
                "attention_mask must hold 1 at tokens and 0 at padding, got other values",
            )
        return attention_mask.bool()

    def _read_scores_mask(self, mask: Tensor, keys: int) -> Tensor:
        """Return a mask [B or 1, H or 1, T, S] of the scores, after checks."""
        rows, heads, *sizes = mask.shape
        if rows not in (1, self.rows) or sizes != [self.time, keys]:
            raise ValueError(
                f"attention_mask must have shape [{self.rows}, 1, {self.time}, {keys}], got {list(mask.shape)}"
            )
        if mask.dtype == torch.bool:
            return mask
        message = "attention_mask [B, 1, T, S] must be boolean, or 0 and negative numbers that are added to the scores"
        if not mask.is_floating_point():
            raise ValueError(f"{message}, got {mask.dtype}")
        self.require((mask <= 0).all(), f"{message}, got other values")
        return mask


def _document_boundaries(tokens: Tensor, named: dict[str, Tensor]) -> Tensor | None:
    """Return the cu_seqlens [n+1] of packed tokens [1, T, ...] from any of their names; None if not packed."""
    if not named:
        return None
    (first, boundaries), *others = ((name, _read_boundaries(tokens, name, value)) for name, value in named.items())
    for name, other in others:
        if not torch.equal(boundaries.unique(), other.unique()):
            raise ValueError(f"{first} and {name} must describe the same documents, got different boundaries")
    return boundaries


def _read_boundaries(tokens: Tensor, name: str, boundaries: Tensor) -> Tensor:
    """Return the cu_seqlens [n+1] of one argument, after checks."""
    rows, time = tokens.shape[:2]
    if rows != 1:
        raise ValueError(f"{name} describes packed documents and needs a batch of 1, got a batch of {rows}")
    if name == "seq_idx":
        if boundaries.numel() != time:
            raise ValueError(f"seq_idx must have one entry per token ({time}), got shape {list(boundaries.shape)}")
        document_T = boundaries.reshape(-1).to(tokens.device)
        starts = (document_T[1:] != document_T[:-1]).nonzero().squeeze(1) + 1
        edges = starts.new_tensor([0, time])
        return torch.cat([edges[:1], starts, edges[1:]]).to(torch.int32)
    boundaries = boundaries.reshape(-1)
    ends = boundaries.tolist()
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != time or ends != sorted(ends):
        raise ValueError(f"{name} must rise from 0 to the number of tokens ({time}), got {ends}")
    return boundaries.to(tokens.device)


def has_shape(x: Tensor, *shape: int | Tensor) -> bool:
    """Return True for a tensor of this shape, also in a graph, where `in` takes tuples with a free size for unequal."""
    return x.dim() == len(shape) and all(x.shape[dim] == size for dim, size in enumerate(shape))


def _next_real(real: Tensor) -> Tensor:
    """Return for each column [B, T] the next column that holds a token; T if there is none."""
    time = real.shape[1]
    column = torch.where(real, torch.arange(time, device=real.device), time)
    behind = F.pad(column[:, 1:], (0, 1), value=time)
    return behind.flip(1).cummin(1).values.flip(1)

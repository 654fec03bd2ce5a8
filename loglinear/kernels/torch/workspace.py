"""Memory for the temporaries of a slab, which the next slab and the next call use again.

Pages that come fresh from the system cost more than what is computed in them, most of all beside other processes. So
inside `recycled()` large temporaries lie in blocks that a thread keeps. A block is handed out only when no tensor lies
in it: every tensor, with all its views, holds a reference to its block, and Python counts them. Hence it does not
matter who keeps a temporary, or for how long. Outside, and on other devices, whose allocators keep memory by
themselves, everything here is the plain operation, which autograd can record.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SMALLEST = 128 << 10  # bytes; what is smaller comes from the heap, which keeps it
LIMIT = 256 << 20  # bytes that a thread keeps at most; what is more comes fresh
ALIGNMENT = 64  # as torch's own allocator: vector instructions may round otherwise elsewhere


class _Blocks(threading.local):
    """One thread's."""

    def __init__(self) -> None:
        self.is_open = False
        self.blocks: list[bytearray] = []

    def find(self, size: int) -> bytearray | None:
        """A block in which no tensor lies, of `size` to twice as many bytes; else a new one; beyond the limit None."""
        free = [b for b in range(len(self.blocks)) if _references(self.blocks, b) == _UNUSED]
        fitting = [b for b in free if size <= len(self.blocks[b]) <= 2 * size]
        if fitting:
            return self.blocks[min(fitting, key=lambda b: len(self.blocks[b]))]
        if sum(map(len, self.blocks)) + size > LIMIT:
            self.blocks = [block for b, block in enumerate(self.blocks) if b not in free]
            if sum(map(len, self.blocks)) + size > LIMIT:
                return None
        self.blocks.append(bytearray(size))
        return self.blocks[-1]


def _references(blocks: list[bytearray], b: int) -> int:
    return sys.getrefcount(blocks[b])


_UNUSED = _references([bytearray(1)], 0)  # what the list and the counting hold: Pythons differ
_own = _Blocks()


@contextmanager
def recycled() -> Iterator[None]:
    """Inside, this thread's large temporaries lie in its own blocks. They must not be given to users."""
    before, _own.is_open = _own.is_open, True
    try:
        yield
    finally:
        _own.is_open = before


def is_recycling(x: Tensor) -> bool:
    """Return True if temporaries of this tensor's device lie in blocks here."""
    return _own.is_open and x.device.type == "cpu"


def empty(like: Tensor, *shape: int) -> Tensor:
    """As `like.new_empty`."""
    count, block = 1, None
    for size in shape:
        count *= size
    size = count * like.element_size()
    if size >= SMALLEST and is_recycling(like):
        block = _own.find(size + ALIGNMENT)
    if block is None:
        return like.new_empty(shape)
    whole = torch.frombuffer(block, dtype=torch.uint8)
    first = -whole.data_ptr() % ALIGNMENT
    return whole[first : first + size].view(like.dtype).view(shape)


def zeros(like: Tensor, *shape: int) -> Tensor:
    """As `like.new_zeros`."""
    return empty(like, *shape).zero_() if _own.is_open else like.new_zeros(shape)


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [..., m, k] @ b [..., k, n] of equal leading dimensions."""
    if not _own.is_open:
        return a @ b if out is None else out.copy_(a @ b)
    if out is None:
        out = empty(a, *a.shape[:-1], b.shape[-1])
        torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out=out.flatten(0, -3))
        return out
    return torch.matmul(a, b, out=out)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a * b in the layout of a, rows or columns; b may be broadcast."""
    if not _own.is_open:
        return a * b
    columns = a.mT.is_contiguous() and not a.is_contiguous()
    return torch.mul(a, b, out=empty(a, *a.mT.shape).mT if columns else empty(a, *a.shape))


def scaled(a: Tensor, b: Tensor) -> Tensor:
    """a * b, in the memory of a if it is whole and autograd does not record; b may be broadcast."""
    return a.mul_(b) if _own.is_open and a.is_contiguous() else product(a, b)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of dimension 1, in the order of the index tensor flattened."""
    rows = rows.flatten()
    if not _own.is_open:
        return x.index_select(1, rows)
    return torch.index_select(x, 1, rows, out=empty(x, x.shape[0], len(rows), *x.shape[2:]))

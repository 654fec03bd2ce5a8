"""One call, watched: the memory that it allocates, and the kernels that it starts.

`TorchFunctionMode` shows every function of torch that the call uses, the launchers tell every launch. A recording is
complete if all that the call does can be repeated from it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from loglinear.kernels.triton.launcher import THREAD, Compiled

# The functions of torch that a call may use: those that allocate (do they fill with zeros?), read a tensor's
# description, make a view, or return the tensor itself where there is nothing to copy; after the last launch also more.
ALLOCATIONS = {torch.empty: False, torch.empty_like: False, torch.zeros_like: True}
DESCRIPTIONS = {"__get__", "__len__", "data_ptr", "dim", "element_size", "numel", "size", "stride", "untyped_storage"}
VIEWS = {"__getitem__", "view"}
COPIES = {"contiguous", "to"}
ENDINGS = {"sum", "to", "unflatten"}

Tensors = tuple[Any, ...]  # each a tensor or None


@dataclass(eq=False)
class Block:
    """Memory that the call allocated, and the first and the last launch that use it."""

    bytes: int
    is_zeroed: bool
    first: int = sys.maxsize
    last: int = -1


class Number(NamedTuple):
    """A value that every such call has. Its text tells 0.0 from -0.0, which are equal."""

    type: type
    text: str


class Address(NamedTuple):
    """The number of one of the call's tensors, or a block; and bytes from its start."""

    base: int | Block
    offset: int


class Group(NamedTuple):
    """A tuple among a kernel's arguments."""

    values: tuple[Any, ...]


class Launched(NamedTuple):
    compiled: Compiled
    grid: tuple[int, ...]
    values: tuple[Any, ...]


class Ending(NamedTuple):
    """A function of torch after the last launch: of a block that is a whole tensor, or of an earlier ending."""

    function: Any
    source: Block | int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Tensor


class Recording(TorchFunctionMode):
    """The events inside a `with`. `tensors` come from outside: different objects, by which their place is known."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.is_complete = True
        self.outer: Recording | None = None
        self.tensors = {id(x): i for i, x in enumerate(tensors) if x is not None}
        self.blocks: dict[int, Block] = {}  # by address: the latest, because the memory of one may become another's
        self.values: dict[Number | Address | Group, Any] = {}  # a group comes after its members
        self.launches: list[Launched] = []
        self.owned: dict[Block, Tensor] = {}  # blocks that each call allocates as a tensor of its own
        self.endings: list[Ending] = []

    def __enter__(self) -> Recording:
        self.outer, THREAD.recording = THREAD.recording, self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        THREAD.recording = self.outer

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found, name = function(*args, **kwargs), getattr(function, "__name__", "")
        if function in ALLOCATIONS:
            memory = found.untyped_storage()
            self.blocks[memory.data_ptr()] = Block(memory.nbytes(), ALLOCATIONS[function])
        elif name == "zero_":
            self.zeroed(found)
        elif name in VIEWS:
            self.require(found.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr())
        elif name in ENDINGS and found is not args[0]:
            self.ended(function, args, kwargs, found)
        else:
            self.require(name in DESCRIPTIONS or name in COPIES and found is args[0])
        return found

    def require(self, condition: bool) -> None:
        """Without it the call cannot be repeated."""
        self.is_complete &= condition

    def zeroed(self, x: Tensor) -> None:
        """A block that no kernel has used gets its zeros where it is allocated."""
        block = self.whole_block(x)
        if block is not None:
            self.require(block.last < 0)
            block.is_zeroed = True

    def ended(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        x, *rest = args
        self.require(not any(isinstance(y, Tensor) for y in (*rest, *kwargs.values())))
        source = self.source(x)
        if source is not None:
            self.endings.append(Ending(function, source, tuple(rest), kwargs, result))

    def source(self, x: Tensor) -> Block | int | None:
        """The ending that has made x, or its block, which then is a tensor of its own."""
        for i, ending in enumerate(self.endings):
            if x is ending.result:
                return i
        block = self.whole_block(x)
        if block is not None:
            self.require(self.owned.setdefault(block, x).shape == x.shape)
        return block

    def whole_block(self, x: Tensor) -> Block | None:
        block = self.block_of(x)
        self.require(block is not None and x.is_contiguous() and 0 < x.numel() * x.element_size() == block.bytes)
        return block

    def launched(self, compiled: Compiled | None, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """A launcher has started a kernel; None if in a way that may not be repeated."""
        self.require(compiled is not None and not self.endings)
        if compiled is not None:
            values = (*map(self.value, arguments), *map(self.number, compiled.values))
            self.launches.append(Launched(compiled, (*grid, 1, 1)[:3], values))

    def value(self, x: Any) -> Number | Address | Group:
        """Remember the value of an argument, and return its name."""
        if isinstance(x, tuple):
            group = Group(tuple(map(self.value, x)))
            self.values.setdefault(group)
            return group
        if not isinstance(x, Tensor):
            return self.number(x)
        if not x.numel():  # its address is none
            return self.number(0)
        address = self.address(x)
        self.values.setdefault(address)
        return address

    def number(self, x: Any) -> Number:
        number = Number(type(x), str(x))
        self.values.setdefault(number, x)
        return number

    def address(self, x: Tensor) -> Address:
        if id(x) in self.tensors:
            return Address(self.tensors[id(x)], 0)
        block = self.block_of(x)
        if block is None:
            return Address(0, 0)
        block.first, block.last = min(block.first, len(self.launches)), len(self.launches)
        return Address(block, x.data_ptr() - x.untyped_storage().data_ptr())

    def block_of(self, x: Tensor) -> Block | None:
        """The memory of a tensor that this call allocated."""
        block = self.blocks.get(x.untyped_storage().data_ptr())
        self.require(block is not None)
        return block

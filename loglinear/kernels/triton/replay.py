"""A call's launches, written down once and started again from the list.

The kernels of a call, their grids, their numbers and the places of their arrays follow from its tensors' shapes,
strides, dtypes and alignments, and from its options. `replayed` finds them once for each such key. A later call
allocates its results and one workspace, adds up addresses, and starts the kernels
(docs/lab-notes/2026-11-30-host-cost.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from loglinear.kernels.triton.launcher import THREAD, Compiled, is_watched, launch_key, specialize
from loglinear.kernels.triton.recording import Address, Block, Group, Number, Recording, Tensors

ALIGNMENT = 512  # bytes, as of torch's own allocations on a GPU
MAX_WORKSPACE = 1 << 30  # bytes: a call that needs more keeps the device busy, and may find no block of this size
MAX_KEYS = 1024  # of a function; then it forgets all, so that lengths that never return do not fill the memory

Take = Callable[[list[Any]], tuple[Any, ...]]  # some values of a list


class Owned(NamedTuple):
    """A tensor that every call allocates by itself."""

    shape: torch.Size
    dtype: torch.dtype
    is_zeroed: bool

    def allocate(self, device: torch.device) -> Tensor:
        make = torch.zeros if self.is_zeroed else torch.empty
        return make(self.shape, dtype=self.dtype, device=device)


class Program(NamedTuple):
    """The launches of a call. They take their arguments from one list: numbers, then addresses, then tuples of both."""

    owned: list[Owned]
    workspace: int  # bytes, of all other arrays
    numbers: list[Any]
    addresses: list[tuple[int, int]]  # which tensor, and how many bytes after its start
    tuples: list[Take]
    launches: list[tuple[Compiled, tuple[int, ...], Take]]
    endings: list[tuple[Callable[..., Tensor], int, tuple[Any, ...], dict[str, Any]]]  # functions of owned tensors
    results: list[int | None]  # which owned tensor or ending
    make: Callable[[Iterable[Tensor | None]], Any]  # their named tuple

    def run(self, tensors: Tensors, stream: int) -> Any:
        device = tensors[0].device
        owned = [x.allocate(device) for x in self.owned]
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=device)
        starts = [0 if x is None else x.data_ptr() for x in (*tensors, *owned, workspace)]
        values = self.numbers + [starts[i] + offset for i, offset in self.addresses]
        for take in self.tuples:
            values.append(take(values))
        for compiled, (x, y, z), take in self.launches:
            compiled.run(x, y, z, stream, compiled.function, compiled.metadata, None, None, None, *take(values))
        for function, source, args, kwargs in self.endings:
            owned.append(function(owned[source], *args, **kwargs))
        return self.make(None if i is None else owned[i] for i in self.results)

    @property
    def has_hooks(self) -> bool:
        return any(compiled.kernel.pre_run_hooks for compiled, _, _ in self.launches)


def program_of(recording: Recording, tensors: Tensors, results: Any) -> Program | None:
    """The program of a recorded call; None if it cannot be repeated."""
    sources = [None if x is None else recording.source(x) for x in results]
    owned = list(recording.owned)
    addresses = [x for x in recording.values if isinstance(x, Address)]
    others = {x.base for x in addresses if isinstance(x.base, Block)}.difference(owned)
    places, workspace = packed(others)
    recording.require(len(recording.launches) > 0 and workspace <= MAX_WORKSPACE)
    recording.require(not any(block.is_zeroed for block in others))
    if not recording.is_complete:
        return None
    starts: dict[Any, tuple[int, int]] = {i: (i, 0) for i in range(len(tensors))}
    starts |= {block: (len(tensors) + i, 0) for i, block in enumerate(owned)}
    starts |= {block: (len(tensors) + len(owned), place) for block, place in places.items()}
    numbers = [x for x in recording.values if isinstance(x, Number)]
    groups = [x for x in recording.values if isinstance(x, Group)]
    index = {value: i for i, value in enumerate((*numbers, *addresses, *groups))}

    def taker(values: Iterable[Any]) -> Take:
        first, *rest = (index[x] for x in values)
        return itemgetter(first, *rest) if rest else lambda values: (values[first],)

    def place(source: Block | int) -> int:
        return owned.index(source) if isinstance(source, Block) else len(owned) + source

    return Program(
        [Owned(x.shape, x.dtype, block.is_zeroed) for block, x in recording.owned.items()],
        workspace,
        [recording.values[x] for x in numbers],
        [(starts[base][0], starts[base][1] + offset) for base, offset in addresses],
        [taker(x.values) for x in groups],
        [(x.compiled, x.grid, taker(x.values)) for x in recording.launches],
        [(x.function, place(x.source), x.args, x.kwargs) for x in recording.endings],
        [None if x is None else place(x) for x in sources],
        type(results)._make,
    )


def packed(blocks: Collection[Block]) -> tuple[dict[Block, int], int]:
    """Places in one workspace, and its size: two blocks that no launch needs at the same time may share memory."""
    places: dict[Block, int] = {}
    for block in sorted(blocks, key=lambda block: block.bytes, reverse=True):
        place = 0
        for other, start in sorted(places.items(), key=lambda item: item[1]):
            if other.first <= block.last and block.first <= other.last and start < place + block.bytes:
                place = max(place, -(-(start + other.bytes) // ALIGNMENT) * ALIGNMENT)
        places[block] = place
    return places, max((place + block.bytes for block, place in places.items()), default=0)


def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function (tensors, scale, *options) that returns a named tuple of tensors.

    Its launches may depend on nothing but its arguments' key, see `call_key`. The second call with a key is recorded,
    because a recording takes some milliseconds and many lengths never return. A call that cannot be repeated runs as
    it is each time; so do all while somebody watches launches, inside of another recording, and where no kernel has a
    launcher.
    """
    if specialize is None or knobs.runtime.interpret:
        return function
    seen: set[Any] = set()
    programs: dict[Any, Program | None] = {}

    @functools.wraps(function)
    def call(tensors: Tensors, scale: float, *options: Any) -> Any:
        if is_watched() or THREAD.recording is not None:  # an outer recording sees launches of a launcher alone
            return function(tensors, scale, *options)
        active = driver.active
        device = active.get_current_device()
        key = call_key(active, device, tensors, scale, options)
        program = programs.get(key)
        if program is not None and not program.has_hooks:
            return program.run(tensors, active.get_current_stream(device))
        if key in programs or key not in seen:
            if len(seen) >= MAX_KEYS:
                seen.clear()
                programs.clear()
            seen.add(key)
            return function(tensors, scale, *options)
        apart = tuple(None if x is None else x.detach() for x in tensors)  # different objects, even of one tensor
        with Recording(apart) as recording:
            results = function(apart, scale, *options)
        programs[key] = program_of(recording, apart, results)
        return results

    return call


def call_key(active: Any, device: int, tensors: Tensors, scale: float, options: tuple[Any, ...]) -> Any:
    """Two calls with equal keys start the same kernels with the same numbers.

    A launch depends on its kernel's key in `launcher`, its grid, and its values. The stages compute these from their
    tensors' shapes, strides and dtypes and from the options, and constants of their modules. They cannot depend on the
    values inside of tensors, because a recording refuses every function that reads one. Arrays of the call are aligned
    in the same way each time; the alignment of the others is in the key.
    """
    shapes = [None if x is None else (x.shape, x.stride(), x.device) for x in tensors]
    return launch_key(active, device, tensors, (tuple(shapes), scale.hex(), options))  # hex: -0.0 equals 0.0

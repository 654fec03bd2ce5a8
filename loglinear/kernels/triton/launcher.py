"""A short way to start a kernel that the same process has started before.

`JITFunction.run` binds every argument by name, specialises it, writes the options as a string and calls hooks that
nobody has set: half of the host's time of a short call. `Launcher` makes one key of a launch and starts the kernel that
Triton chose for an equal one (docs/lab-notes/2026-11-30-host-cost.md). The rest is left to Triton: the first launch of
a key, hooks and profilers of launches, versions without a native specialisation (below 3.5), and the interpreter.
"""

from __future__ import annotations

import threading
from functools import lru_cache, partial
from typing import Any, NamedTuple

from triton import knobs
from triton.compiler.compiler import make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

try:
    from triton._C.libtriton import native_specialize_impl as specialize
except ImportError:
    specialize = None

RUN = JITFunction.run  # who replaces it, as benchmarks/resources.py does, sees every launch


class _Thread(threading.local):
    recording: Any = None  # a `recording.Recording` of the call that this thread makes


THREAD = _Thread()


class Compiled(NamedTuple):
    """A kernel that Triton has compiled and loaded, and the constants that it was compiled for."""

    kernel: JITFunction
    run: Any
    function: Any
    metadata: Any
    values: tuple[Any, ...]


def launcher(kernel: Any) -> Any:
    """Decorate a kernel whose compile-time constants come last and are passed by name."""
    return Launcher(kernel) if isinstance(kernel, JITFunction) and specialize is not None else kernel


class Launcher:
    """`launcher[grid](*arguments, **constants)`, where the constants include the compiler's options."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel, self.__name__ = kernel, kernel.__name__
        self.num_arguments = sum(not p.is_constexpr for p in kernel.params)
        self.constants = kernel.params[self.num_arguments :]
        if not all(p.is_constexpr for p in self.constants):
            raise TypeError(f"the constants of {kernel.__name__} must be its last parameters")
        self.launches: dict[Any, Compiled] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Start the kernel on the current device and stream."""
        known = None
        # Other arguments by name, or constants by place, would not be in the key as they have to be.
        if len(arguments) != self.num_arguments or self.kernel.pre_run_hooks or is_watched():
            self.kernel.run(*arguments, grid=grid, warmup=False, **constants)
        else:
            known = self.start(grid, arguments, constants)
        if THREAD.recording is not None:
            THREAD.recording.launched(known, grid, arguments)

    def start(self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> Compiled | None:
        """Start the kernel that is known for these arguments, else let Triton choose one and remember it."""
        active = driver.active
        device = active.get_current_device()
        key = launch_key(active, device, arguments, tuple(constants.items()))
        known = self.launches.get(key)
        if known is None:
            kernel = self.kernel.run(*arguments, grid=grid, warmup=False, **constants)
            if getattr(kernel, "function", None) is not None:  # it has been loaded, not only compiled
                values = tuple(constants.get(p.name, p.default) for p in self.constants)  # in the parameters' order
                known = Compiled(self.kernel, kernel.run, kernel.function, kernel.packed_metadata, values)
                self.launches[key] = known
            return known
        x, y, z = (*grid, 1, 1)[:3]
        stream = active.get_current_stream(device)
        known.run(x, y, z, stream, known.function, known.metadata, None, None, None, *arguments, *known.values)
        return known


def launch_key(active: Any, device: int, arguments: tuple[Any, ...], constants: tuple[Any, ...]) -> Any:
    """Two launches of a kernel with equal keys take the same compiled one.

    Triton chooses by the device, the types of the arguments, the specialisation of those that are not excluded from it,
    the constants, the options, and two knobs. Here no argument is excluded: each integer also counts as 1, a multiple
    of 16 or neither, and each pointer as aligned to 16 bytes or not, on its own and in tuples. So the key is finer.
    """
    types_and_values = specialize(_backend(active, device), arguments, False, True, True)
    options = knobs.runtime.debug, getattr(knobs.compilation, "instrumentation_mode", "")
    return active, device, types_and_values, options, constants


def is_watched() -> bool:
    """Does anybody want to see launches, or change how kernels are compiled? Then Triton starts them."""
    runtime = knobs.runtime
    return (
        JITFunction.run is not RUN
        or _has_calls(runtime.launch_enter_hook)
        or _has_calls(runtime.launch_exit_hook)
        or getattr(runtime, "add_stages_inspection_hook", None) is not None
    )


def _has_calls(hook: Any) -> bool:
    """A hook is a chain of calls, in older versions a function or None."""
    return bool(hook is not None and getattr(hook, "calls", True))


@lru_cache
def _backend(active: Any, device: int) -> Any:
    """The compiler's backend says how arguments are specialised."""
    return make_backend(active.get_current_target())

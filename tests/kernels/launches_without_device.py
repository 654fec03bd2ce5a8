"""Launches of a small kernel, compiled and then given to a driver that only writes them down.

As a program it prints for each of `CASES` three starts, two by the launcher and one by Triton itself, and how many of
the first two Triton made. The interpreter must be off, so that tests start it as a process of its own.
"""

import itertools
import json
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from loglinear.kernels.triton import launcher as launcher_module
from loglinear.kernels.triton.launcher import launcher


class Pair(NamedTuple):
    data: torch.Tensor
    stride: int


class Driver:
    """One that has devices and streams, but starts nothing."""

    def __init__(self):
        self.device, self.stream, self.starts, numbers = 0, 0, [], itertools.count()
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 17},
            load_binary=lambda name, binary, shared, device: (1, (device, next(numbers)), 8, 0, 1024),
        )

    def launcher_cls(self, source, metadata):
        def start(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *values):
            if enter is not None:
                enter(launch_metadata)
            ids = [str(id(value)) for value in values]
            self.starts.append(dict(grid=(x, y, z), stream=stream, device=function[0], kernel=function[1], values=ids))

        return start

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.stream

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@launcher
@triton.jit(do_not_specialize=["length"])
def copy_kernel(source, out, length, SIZE: tl.constexpr, NEGATE: tl.constexpr = False):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(source.data + i * source.stride, mask=i < length, other=0.0)
    tl.store(out + i, -x if NEGATE else x, mask=i < length)


def tensor(dtype=torch.float32, offset=0):
    return torch.zeros(128, dtype=dtype)[offset:]


CASES = {
    "first": {},
    "the same": {},
    "unaligned": dict(source=Pair(tensor(offset=1), 3)),
    "unaligned out": dict(out=tensor(offset=1)),
    "aligned again": dict(source=Pair(tensor(offset=4), 3)),
    "other dtype": dict(source=Pair(tensor(torch.float16), 3)),
    "stride 1": dict(source=Pair(tensor(), 1)),
    "stride of 16": dict(source=Pair(tensor(), 32)),
    "stride of 64 bits": dict(source=Pair(tensor(), 2**40 + 1)),
    "length 1": dict(length=1),
    "length of 64 bits": dict(length=2**40 + 1),
    "constant": dict(SIZE=64),
    "optional constant": dict(NEGATE=True),
    "option": dict(num_warps=8),
    "other stream": dict(stream=7),
    "other device": dict(device=1),
    "debug": dict(debug=True),
}


def launches(source, out, length, device=0, stream=0, debug=False, **constants):
    """Two launches by the launcher, and one by Triton itself."""
    found = driver.active
    found.device, found.stream, knobs.runtime.debug = device, stream, debug
    found.starts.clear()
    for _ in range(2):
        copy_kernel[(2,)](source, out, length, **constants)
    copy_kernel.kernel.run(source, out, length, grid=(2,), warmup=False, **constants)
    return list(found.starts)


def main():
    driver.set_active(Driver())
    runs, hooked = [], []
    by_triton = JITFunction.run

    def run(self, *arguments, **options):
        runs.append(options)
        return by_triton(self, *arguments, **options)

    given = dict(source=Pair(tensor(), 3), out=tensor(), length=100, SIZE=32)

    def case(changes):
        before = len(runs)
        return dict(starts=launches(**(given | changes)), by_triton=len(runs) - before - 1)

    JITFunction.run = launcher_module.RUN = run
    found = {name: case(changes) for name, changes in CASES.items()}
    chain = knobs.runtime.launch_enter_hook
    if hasattr(chain, "add"):
        chain.add(hooked.append)
    else:
        knobs.runtime.launch_enter_hook = hooked.append
    found["hook"] = case({})
    if hasattr(chain, "remove"):
        chain.remove(hooked.append)
    else:
        knobs.runtime.launch_enter_hook = None
    found["no hook"] = case({})
    JITFunction.run = lambda *arguments, **options: run(*arguments, **options)
    found["replaced"] = case({})
    print(json.dumps(dict(cases=found, hooked=len(hooked))))


if __name__ == "__main__":
    main()

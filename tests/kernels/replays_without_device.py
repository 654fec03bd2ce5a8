"""Calls that are recorded and repeated, on a driver without a device: nothing is compiled, launches are written down.

As a program it prints a report as json. The interpreter must be off, so that tests start it as a process of its own.
"""

import contextlib
import functools
import json
from typing import NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from loglinear.kernels.triton import replay
from loglinear.kernels.triton.launcher import THREAD, Compiled, Launcher
from loglinear.kernels.triton.operator import chunkwise
from loglinear.kernels.triton.recording import Recording
from loglinear.partition import FENWICK, Partition
from tests.kernels.launches_without_device import Driver, Pair, copy_kernel

ASKED = [0]  # launches that a launcher was asked for
STARTS: list[tuple] = []  # name, grid, stream, values
KEPT: list[Tensor] = []  # so that no memory of an ordinary call becomes that of another array


def start(self, grid, arguments, constants):
    """In place of a compiled kernel's start, known or not."""
    ASKED[0] += 1
    values = tuple(constants.get(p.name, p.default) for p in self.constants)
    compiled = Compiled(self.kernel, write_down, self.__name__, None, values)
    stream = driver.active.get_current_stream(driver.active.get_current_device())
    write_down(*(*grid, 1, 1)[:3], stream, self.__name__, None, None, None, None, *arguments, *values)
    return compiled


def write_down(x, y, z, stream, name, metadata, launch_metadata, enter, leave, *values):
    STARTS.append((name, (x, y, z), stream, list(flat(values))))
    KEPT.extend(value for value in STARTS[-1][3] if isinstance(value, Tensor))


def flat(value):
    if isinstance(value, tuple):
        for x in value:
            yield from flat(x)
    else:
        yield value


@contextlib.contextmanager
def watched():
    """As if somebody watched launches."""
    is_watched, replay.is_watched = replay.is_watched, lambda: True
    yield
    replay.is_watched = is_watched


def starts_of(call):
    """The launches of a call, and its results."""
    STARTS.clear()
    results = call()
    return list(STARTS), results


def compared(ordinary, repeated, tensors):
    """The first difference between two calls' launches, or None. Each block of memory of the ordinary call has one
    place in the repeated one, where no other is that a launch uses meanwhile."""
    (starts, results), (again, results_again) = ordinary, repeated
    if len(starts) != len(again):
        return f"{len(starts)} launches, repeated {len(again)}"
    moved = {x.untyped_storage().data_ptr(): 0 for x in tensors}
    used: dict[int, list[int]] = {}
    sizes = {}

    def differs(x, y):
        if not isinstance(x, Tensor):
            return type(x) is not type(y) or x != y
        y = y.data_ptr() if isinstance(y, Tensor) else y
        if not x.numel():
            return y != 0
        block = x.untyped_storage().data_ptr()
        sizes[block] = x.untyped_storage().nbytes()
        return moved.setdefault(block, y - x.data_ptr()) != y - x.data_ptr()

    for number, ((*head, values), (*head_again, values_again)) in enumerate(zip(starts, again, strict=True)):
        if head != head_again or len(values) != len(values_again):
            return f"{head} repeated as {head_again}"
        for place, (x, y) in enumerate(zip(values, values_again, strict=True)):
            if differs(x, y):
                return f"{head}: value {place} is {x}, repeated {y}"
            if isinstance(x, Tensor) and x.numel():
                used.setdefault(x.untyped_storage().data_ptr(), []).append(number)
    places = [(block + moved[block], sizes[block], min(numbers), max(numbers)) for block, numbers in used.items()]
    for i, (a, size, first, last) in enumerate(places):
        for b, size_b, first_b, last_b in places[:i]:
            if first <= last_b and first_b <= last and a < b + size_b and b < a + size:
                return f"two arrays at {a} and {b}, of {size} and {size_b} bytes"
    for x, y in zip(results, results_again, strict=True):
        if (x is None) != (y is None) or (x is not None and (x.shape, x.dtype) != (y.shape, y.dtype)):
            return f"a result {x}, repeated {y}"
        block = 0 if x is None or not x.numel() else x.untyped_storage().data_ptr()
        if block in used and y.data_ptr() - x.data_ptr() != moved[block]:
            return "a result is not the array that the kernels wrote"
    return None


def operands(T=300, B=2, G=1, H=2, K=8, V=8, L=9, dtype=torch.float32, delta=False, diagonal=False):
    def make(*shape, dtype=dtype):
        return torch.zeros(B, T, *shape, dtype=dtype)

    beta, gate = make(H, dtype=torch.float32) if delta else None, (H, K) if diagonal else (H,)
    return [make(G, K), make(G, K), make(H, V), make(*gate, dtype=torch.float32), beta, make(H, L, dtype=torch.float32)]


def views_of_one(delta):
    """Queries and keys that lie in one projection, in rows of neighbouring numbers."""
    q, k = torch.zeros(2, 300, 1, 16).split(8, -1)
    return [q, k, *operands(delta=delta)[2:]]


def one_tensor_twice(delta):
    q, _, *rest = operands(delta=delta)
    return [q, q, *rest]


def unaligned(delta):
    x = operands(delta=delta)
    x[2] = torch.zeros(2 * 300 * 2 * 8 + 1)[1:].view(2, 300, 2, 8)
    return x


def columns(delta):
    """Values whose rows are not of neighbouring numbers: the kernels take a copy."""
    x = operands(delta=delta)
    x[2] = torch.zeros(2, 300, 8, 2).transpose(2, 3)
    return x


CALLS = {
    "short": lambda delta: operands(T=20, delta=delta),
    "one row": lambda delta: operands(B=1, delta=delta),
    "two tiers": lambda delta: operands(T=9000, L=15, delta=delta),
    "groups": lambda delta: operands(G=2, H=4, delta=delta),
    "one head a group": lambda delta: operands(G=2, delta=delta),
    "bfloat16": lambda delta: operands(T=1000, dtype=torch.bfloat16, delta=delta),
    "many levels": lambda delta: operands(L=30, delta=delta),
    "one level": lambda delta: operands(L=1, delta=delta),
    "diagonal gate": lambda delta: operands(delta=delta, diagonal=True),
    "final": lambda delta: operands(delta=delta),
    "final, radix 4": lambda delta: operands(delta=delta),
    "views of one": views_of_one,
    "one tensor twice": one_tensor_twice,
    "unaligned": unaligned,
    "columns": columns,
}
RUN_AS_THEY_ARE = {"columns"}


def call_of(name, delta):
    """Forward and backward of a call, and the tensors that come from outside."""
    x, final = CALLS[name](delta), name.startswith("final")
    partition = Partition(4, 16) if name.endswith("radix 4") else FENWICK
    leaves = {id(y): y.requires_grad_() if y.is_leaf else y for y in x if y is not None}
    do = torch.zeros_like(x[2], memory_format=torch.contiguous_format)

    def call():
        output, *others = chunkwise(*x, None, None, None, 0.7, 64 if final else 0, final, partition.numbers)
        grads = torch.autograd.grad(output, list(leaves.values()), do)
        return [output, *others, *grads]

    return call, [*leaves.values(), do]


def repeated(name, delta):
    """Does each of four calls start what an ordinary one does, the last with other tensors? How many asked a launcher
    in the third and the fourth?"""
    (call, tensors), (other, other_tensors) = (call_of(name, delta) for _ in range(2))
    with watched():
        ordinary, ordinary_other = starts_of(call), starts_of(other)
    differences = [compared(ordinary, starts_of(call), tensors) for _ in range(2)]
    before = ASKED[0]
    differences += [
        compared(ordinary, starts_of(call), tensors),
        compared(ordinary_other, starts_of(other), other_tensors),
    ]
    KEPT.clear()
    return dict(differences=differences, asked=ASKED[0] - before)


class Found(NamedTuple):
    """The results of the small calls below."""

    out: Tensor
    total: Tensor | None = None


def copied(source, length=100, stride=1):
    out = torch.empty_like(source)
    copy_kernel[(2,)](Pair(source, stride), out, length, SIZE=64)
    return out


def plain(x, scale, length=100):
    """A call that may be repeated: arrays, views of them, zeros in time, and sums after the last launch."""
    between = torch.empty(2, 128)
    copy_kernel[(2,)](Pair(x, 1), between[1], length, SIZE=64)
    zeros = torch.empty(4, 32, dtype=torch.float64).zero_()
    out = copied(between.contiguous()[1])
    copy_kernel[(2, 3)](Pair(out, x.stride(0)), zeros, scale, SIZE=64)
    return Found(out.to(torch.float32), zeros.sum(1).to(torch.float32))


def computes(x, scale):
    return Found(copied(x + 1))


def reads(x, scale):
    return Found(copied(x, length=int(x[0]) + 100))


def takes_a_view(x, scale):
    return Found(copied(x[:64]))


def takes_another(x, scale, other=torch.zeros(128)):  # noqa: B008
    return Found(copied(other))


def launches_after_a_sum(x, scale):
    out = copied(x)
    total = out.sum(0)
    return Found(copied(x), total)


def clears_what_was_written(x, scale):
    return Found(copied(x).zero_())


def fills(x, scale):
    return Found(copied(x).fill_(1.0))


def returns_a_part(x, scale):
    return Found(copied(x)[:64])


def returns_its_own(x, scale):
    copied(x)
    return Found(x)


def launches_nothing(x, scale):
    return Found(torch.empty_like(x))


REFUSED = [
    computes,
    reads,
    takes_a_view,
    takes_another,
    launches_after_a_sum,
    clears_what_was_written,
    fills,
    returns_a_part,
    returns_its_own,
    launches_nothing,
]


def counted(function):
    """A repeated function of one tensor, and the number of its runs."""
    count = [0]

    @replay.replayed
    def call(tensors, scale, *options):
        count[0] += 1
        return function(*tensors, scale, *options)

    return call, count


def runs_of(function, times=4):
    call, count = counted(function)
    for _ in range(times):
        call((torch.zeros(128),), 1.0)
    return count[0]


# Changes of a call's key, each against the first.
CHANGES = {
    "the same": {},
    "shape": dict(x=torch.zeros(129)),
    "stride": dict(x=torch.zeros(256)[::2]),
    "dtype": dict(x=torch.zeros(128, dtype=torch.float16)),
    "alignment": dict(x=torch.zeros(129)[1:]),
    "scale": dict(scale=2.0),
    "sign of zero": dict(scale=-0.0),
    "option": dict(length=101),
    "device": dict(device=1),
    "debug": dict(debug=True),
    "other stream": dict(stream=7),
}


def runs_after(x=None, scale=0.0, length=100, device=0, stream=0, debug=False):
    """The runs of a function in two calls of a key, after three of the first; and the stream of the last launch."""
    call, count = counted(plain)
    for _ in range(3):
        call((torch.zeros(128),), 0.0, 100)
    before, found = count[0], driver.active
    found.device, found.stream, knobs.runtime.debug = device, stream, debug
    for _ in range(2):
        call((torch.zeros(128) if x is None else x,), scale, length)
    found.device, found.stream, knobs.runtime.debug = 0, 0, False
    return dict(runs=count[0] - before, stream=STARTS[-1][2])


def runs_with_a_hook():
    """The runs of a function while a kernel has a hook, and after."""
    call, count = counted(plain)
    for _ in range(3):
        call((torch.zeros(128),), 1.0)
    hooks, runs = copy_kernel.kernel.pre_run_hooks, copy_kernel.kernel.run
    copy_kernel.kernel.run = lambda *arguments, **options: None
    hooks.append(print)
    call((torch.zeros(128),), 1.0)
    hooks.clear()
    copy_kernel.kernel.run = runs
    return dict(with_hook=count[0] - 2, after=(call((torch.zeros(128),), 1.0), count[0])[1] - 3)


def small_calls():
    """`plain` once as it is and once repeated: the difference of their launches, and its results."""
    x = torch.zeros(128)
    call, count = counted(plain)
    with watched():
        ordinary = starts_of(functools.partial(call, (x,), 0.5))
    for _ in range(2):
        call((x,), 0.5)
    again = starts_of(functools.partial(call, (x,), 0.5))
    total = again[1].total
    is_right = total.dtype == torch.float32 and total.tolist() == [0.0] * 4
    return dict(difference=compared(ordinary, again, [x]), runs=count[0], is_right=is_right)


def nested(known):
    """The differences of four calls that make another repeated call, which has run `known` times before."""
    inner, _ = counted(lambda x, scale: Found(copied(x)))

    @replay.replayed
    def outer(tensors, scale):
        return inner((copied(*tensors),), scale)

    x = torch.zeros(128)
    for _ in range(known):
        inner((x,), 0.5)
    call = functools.partial(outer, (x,), 0.5)
    with watched():
        ordinary = starts_of(call)
    return [compared(ordinary, starts_of(call), [x]) for _ in range(4)]


def outer_recordings():
    """Does a recording come back when one inside it ends, also by an error?"""
    found = []
    with Recording(()) as outer:
        for error in (None, ValueError):
            with contextlib.suppress(ValueError), Recording(()):
                if error is not None:
                    raise error
            found.append(THREAD.recording is outer)
    return [*found, THREAD.recording is None]


def main():
    driver.set_active(Driver())
    Launcher.start = start
    report = dict(
        calls={f"{name} {delta}": repeated(name, delta) for name in CALLS for delta in (False, True)},
        refused={function.__name__: runs_of(function) for function in REFUSED},
        changes={name: runs_after(**change) for name, change in CHANGES.items()},
        hook=runs_with_a_hook(),
        small=small_calls(),
        nested=[nested(known) for known in (0, 1, 3)],
        outer=outer_recordings(),
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()

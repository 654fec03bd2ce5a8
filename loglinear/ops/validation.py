"""The checks of the arguments of operators, steps and states: a wrong argument raises one line that names it.

One table holds the shapes. A letter takes its size from the first tensor that has it; all other tensors must agree.
"""

# B batch, T time, N sequences, G query/key groups, H value heads, K key, V value, L levels, C chunk, M blocks
from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from loglinear.kernels.torch import is_traced
from loglinear.kernels.unchanging import once
from loglinear.partition import LARGEST_CHUNK, Partition

Sizes = dict[str, int]

Table = Mapping[str, str]  # from a tensor's name to its axes

_DELTA_RULE = {"q": "BTGK", "k": "BTGK", "v": "BTHV", "log_decay": "BTH", "beta": "BTH", "level_scales": "BTHL"}
_SCALAR_GATE = {name: axes for name, axes in _DELTA_RULE.items() if name != "beta"}
OPERANDS: dict[bool, Table] = {False: _SCALAR_GATE, True: _DELTA_RULE}  # key: True for the delta rule
TOKENS: dict[bool, Table] = {
    delta_rule: {name: axes.replace("BT", "N") for name, axes in table.items()}
    for delta_rule, table in OPERANDS.items()
}
STATE = {
    "position": "N",
    "blocks": "NMHKV",
    "k": "NCGK",
    "v": "NCHV",
    "log_decay": "NCH",
    "beta": "NCH",
    "first": "N",
}
INVERSE = "NCHC"

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
WIDE_FLOATS = frozenset({torch.float32, torch.float64})
INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
INDICES = frozenset({torch.int32, torch.int64})
BOOL = frozenset({torch.bool})
_NAMES = {
    FLOATS: "floats of 16, 32 or 64 bits",
    WIDE_FLOATS: "float32 or float64",
    INTEGERS: "integers",
    INDICES: "int32 or int64",
    BOOL: "bool",
}

MAX_POSITION = 2**62


def check_tensor(
    name: str,
    x: Any,
    axes: str,
    sizes: Sizes,
    device: torch.device | None = None,
    dtypes: frozenset[torch.dtype] = FLOATS,
    or_axes: str = "",
) -> None:
    """Raise ValueError unless `x` is a dense tensor of one of `dtypes` with these axes; add new axes to `sizes`.

    A tensor with as many axes as `or_axes` must have those.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} must hold {_NAMES[dtypes]}, got {x.dtype}")
    if x.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {x.layout}")
    shape = x.shape
    if or_axes and len(shape) == len(or_axes):
        axes, or_axes = or_axes, ""
    fits = len(shape) == len(axes)
    if fits:
        for axis, size in zip(axes, shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                fits = False
                break
    if not fits:
        known = [str(sizes.get(axis, axis)) for axis in axes]
        values = "" if known == list(axes) else f" = [{', '.join(known)}]"
        values += f" or [{', '.join(or_axes)}]" if or_axes else ""
        raise ValueError(f"{name} must have shape [{', '.join(axes)}]{values}, got {list(shape)}")
    if 0 in shape:
        raise ValueError(f"{name} must not be empty, got shape {list(shape)}")
    if device is None:
        if x.device.type == "meta":
            raise ValueError(f"{name} must hold data, got a tensor on the meta device")
    elif x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}")


def check_operands(call: Any, table: Table, sizes: Sizes, device: torch.device | None = None) -> None:
    """Raise ValueError unless the operands, attributes of `call`, fit a table of `OPERANDS` or `TOKENS`.

    log_decay may be None, or have one axis more, K, for a diagonal gate.
    """
    for name, axes in table.items():
        x = getattr(call, name)
        if x is None and name == "log_decay":
            continue
        check_tensor(name, x, axes, sizes, device, or_axes=axes + "K" if name == "log_decay" else "")
        device = x.device
        if name == "v":
            check_groups("v", sizes["H"], sizes["G"])


def check_gate(name: str, state: Any, is_diagonal: bool) -> None:
    """Raise ValueError if a `FenwickState` has the other kind of gate."""
    if state.is_diagonal != is_diagonal:
        kinds = ("a scalar gate (one decay per head)", "a diagonal gate (a decay per key channel)")
        raise ValueError(f"{name} must be a state of {kinds[is_diagonal]}, got one of {kinds[not is_diagonal]}")


def check_log_decay(log_decay: Tensor | None, active: Tensor | None = None) -> None:
    """Raise ValueError if a log decay on the CPU is above 0; NaN passes, and so does a row that is not active.

    NaN passes in every operand: a check would read all values, and the loss tells of a training that diverged.
    A GPU's values are not read, because the CPU would wait for them. Nor are those of a tensor that is being traced.
    """
    if log_decay is None or not is_readable(log_decay):
        return
    if log_decay.detach().amax().item() <= 0:  # one pass for almost every call; NaN comes out of it if there is one
        return
    is_wrong = log_decay > 0
    if active is not None:
        is_wrong &= active.view(-1, *[1] * (log_decay.dim() - 1))
    if is_wrong.any():
        largest = log_decay[is_wrong].max().item()
        raise ValueError(f"log_decay must be at most 0 (the logarithm of the decay), got a maximum of {largest:.6g}")


def is_readable(x: Tensor) -> bool:
    """Return True if Python may read a value: a plain tensor on the CPU outside every graph, trace and transform."""
    if x.device.type != "cpu" or is_traced():
        return False
    return type(x) is Tensor or type(x) is torch.nn.Parameter  # not a FakeTensor


def check_state_dtype(name: str, state: Any, operands: Iterable[Tensor | None]) -> None:
    """Raise ValueError unless a `FenwickState` has the dtype that an operator returns for these operands."""
    expected = working_dtype(operands)
    if state.k.dtype != expected:
        raise ValueError(f"{name} must hold {expected}, as final_state does for these inputs, got {state.k.dtype}")


def working_dtype(operands: Iterable[Tensor | None]) -> torch.dtype:
    """Return the dtype of an operator's sums and states: float64 if any operand is, float32 otherwise."""
    is_float64 = any(x is not None and x.dtype == torch.float64 for x in operands)
    return torch.float64 if is_float64 else torch.float32


def check_groups(name: str, heads: int, groups: int) -> None:
    """Raise ValueError unless every group serves the same number of heads."""
    if heads % groups:
        raise ValueError(f"{name}'s H = {heads} heads must be a multiple of q's G = {groups} groups")


def check_state(name: str, state: Any, sizes: Sizes, device: torch.device | None = None) -> None:
    """Raise ValueError unless the parts of a `FenwickState` fit each other, the table and the `sizes` known so far."""
    C = sizes.get("C")
    if C is not None and isinstance(state.k, Tensor) and state.k.dim() == 4 and state.k.shape[1] != C:
        raise ValueError(f"{name} was made with chunk_size {state.k.shape[1]}, got chunk_size {C}")
    dtype = None
    for part, axes in STATE.items():
        x = getattr(state, part)
        if x is None and part in ("beta", "first"):
            continue
        is_number = part in ("position", "first")
        dtypes, or_axes = INTEGERS if is_number else WIDE_FLOATS, axes + "K" if part == "log_decay" else ""
        check_tensor(f"{name}.{part}", x, axes, sizes, device, dtypes, or_axes)
        device = x.device
        if is_number:
            continue
        if dtype is not None and x.dtype != dtype:
            raise ValueError(f"{name}.{part} must hold {dtype} as {name}.blocks does, got {x.dtype}")
        dtype = x.dtype
    chunk_length(f"{name}'s chunk_size", sizes["C"])
    check_groups(name, sizes["H"], sizes["G"])
    check_tree_positions(f"{name}.position", state.position)
    if state.first is not None:
        check_first(f"{name}.first", state.first, state.position)


def check_tree_positions(name: str, position: Tensor) -> None:
    """Raise ValueError unless positions are from 0 to 2**62 - 1.

    A GPU checks its values itself, so the CPU does not wait; a wrong one ends the process with the same text.
    """
    if position.is_cuda or torch.compiler.is_compiling():
        once(lambda: _assert_tree_positions(name, position), "tree positions", position)
        return
    for number in position.tolist():
        if not 0 <= number < MAX_POSITION:
            raise ValueError(f"{name} must be from 0 to 2**62 - 1, got {number}")


def _assert_tree_positions(name: str, position: Tensor) -> None:
    fits = ((position >= 0) & (position < MAX_POSITION)).all()
    torch._assert_async(fits, f"{name} must be from 0 to 2**62 - 1")


def check_first(name: str, first: Tensor, position: Tensor) -> None:
    """Raise ValueError unless each sequence began at or before its position; a GPU checks its values itself."""
    if first.is_cuda or torch.compiler.is_compiling():
        once(lambda: _assert_first(name, first, position), "first positions", first, position)
        return
    for number, most in zip(first.tolist(), position.tolist(), strict=True):
        if not 0 <= number <= most:
            raise ValueError(f"{name} must be from 0 to the position {most}, got {number}")


def _assert_first(name: str, first: Tensor, position: Tensor) -> None:
    torch._assert_async(((first >= 0) & (first <= position)).all(), f"{name} must be from 0 to the position")


def check_family(name: str, has_beta: bool, delta_rule: bool) -> None:
    """Raise ValueError if a state belongs to the other operator."""
    if has_beta != delta_rule:
        kinds = ("a gate without the delta rule (no beta)", "the delta rule (with beta)")
        raise ValueError(f"{name} must be a state of {kinds[delta_rule]}, got one of {kinds[has_beta]}")


def check_blocks(partition: Partition, levels: int, chunk_size: int, blocks: int) -> None:
    """Raise ValueError unless a state of this many blocks has this many levels."""
    needed = partition.num_blocks(levels, chunk_size)
    if needed != blocks:
        raise ValueError(f"level_scales with L = {levels} needs a state of {needed} blocks, got one of {blocks}")


def check_partition(name: str, partition: Any) -> None:
    """Raise ValueError unless `partition` is a `Partition` whose finest block is no longer than a chunk may be."""
    if not isinstance(partition, Partition):
        raise ValueError(f"{name} must be a Partition, got {_said(partition)}")
    if partition.finest_block > LARGEST_CHUNK:
        raise ValueError(f"{name} must have a finest_block of at most {LARGEST_CHUNK}, got {partition.finest_block}")


def check_same_partition(name: str, made_with: Partition, partition: Partition) -> None:
    """Raise ValueError if a state was made with another partition."""
    if made_with != partition:
        raise ValueError(f"{name} was made with {made_with}, got {partition}")


def check_owned(parts: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless steps may write into these parts: contiguous, unshared, outside any autograd graph."""
    for name, x in parts.items():
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous memory of its own, got strides {x.stride()}")
        if x.requires_grad:
            raise ValueError(f"{name} must carry no gradients: make the state with DecodeState.of")
        if not torch.compiler.is_compiling() and x.is_inference():
            raise ValueError(f"{name} must not be made in inference mode: make the state with DecodeState.of")
    owners: dict[Any, str] = {}
    for name, x in {} if torch.compiler.is_compiling() else parts.items():
        other = owners.setdefault((x.untyped_storage()._cdata, x.storage_offset()), name)
        if other != name:
            raise ValueError(f"{name} must be memory of its own, got that of {other}")


def check_rows(name: str, rows: Any, count: int, device: torch.device | None = None) -> None:
    """Raise ValueError unless `rows` [n] are row numbers from 0 to count - 1; on a GPU the selection checks them."""
    check_tensor(name, rows, "n", {}, device, INDICES)
    if rows.is_cuda or torch.compiler.is_compiling():
        return
    for number in rows.tolist():
        if not 0 <= number < count:
            raise ValueError(f"{name} must be from 0 to {count - 1}, the state's rows, got {number}")


def check_cu_seqlens(B: int, T: int, cu_seqlens: Any) -> None:
    """Raise ValueError unless `cu_seqlens` are boundaries of packed sequences in a batch [B, T] with B = 1.

    A GPU checks its values itself, so the CPU does not wait; a wrong one ends the process with the same text. A
    compiled graph does the same, because it would break where Python reads a value.
    """
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens must be a tensor of integers, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must have shape [N + 1] with N >= 1, got {list(cu_seqlens.shape)}")
    check_tensor("cu_seqlens", cu_seqlens, "n", {}, None, INTEGERS)
    if B != 1:
        raise ValueError(f"cu_seqlens needs a packed batch with B = 1, got B = {B}")
    if cu_seqlens.is_cuda or torch.compiler.is_compiling():
        once(lambda: _assert_boundaries(T, cu_seqlens), ("boundaries", T), cu_seqlens)
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {ends[0]}")
    if ends[-1] != T:
        raise ValueError(f"cu_seqlens must end at T = {T}, got {ends[-1]}")
    if any(end < start for start, end in zip(ends[:-1], ends[1:], strict=True)):
        raise ValueError(f"cu_seqlens must not decrease, got {ends}")


def _assert_boundaries(T: int, cu_seqlens: Tensor) -> None:
    torch._assert_async(cu_seqlens[0] == 0, "cu_seqlens must start at 0")
    torch._assert_async(cu_seqlens[-1] == T, f"cu_seqlens must end at T = {T}")
    torch._assert_async((cu_seqlens.long().diff() >= 0).all(), "cu_seqlens must not decrease")


def _said(value: Any) -> str:
    """Return a plain value as one line of text, or the type of any other value."""
    is_plain = value is None or isinstance(value, str | numbers.Number)
    return repr(value)[:80] if is_plain else type(value).__name__


def is_whole(value: Any) -> bool:
    """Return True for an integer of Python or numpy, which a bool is not."""
    return isinstance(value, int | numbers.Integral) and not isinstance(value, bool)


def whole_number(name: str, value: Any, most: int | None = None, least: int = 1) -> int:
    """Return an integer of Python or numpy as an int; ValueError for a bool or a value outside `least` .. `most`."""
    if not is_whole(value) or int(value) < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {_said(value)}")
    if most is not None and int(value) > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
    return int(value)


def chunk_length(name: str, value: Any) -> int:
    """Return a power of two of Python or numpy as an int; ValueError if it is none or above 4096."""
    if not is_whole(value) or value < 1 or int(value) & (int(value) - 1):
        raise ValueError(f"{name} must be a power of two, got {_said(value)}")
    if int(value) > LARGEST_CHUNK:
        raise ValueError(f"{name} must be at most {LARGEST_CHUNK}, got {_said(value)}")
    return int(value)


def finite_number(name: str, value: Any) -> float:
    """Return a real number as a float; ValueError for a bool, an infinity or NaN."""
    if type(value) is float and -math.inf < value < math.inf:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | numbers.Real):
        raise ValueError(f"{name} must be a number, got {_said(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name} must be finite, got {_said(value)}")
    return number


def flag(name: str, value: Any) -> bool:
    """Return a bool; ValueError for any other value."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {_said(value)}")
    return value


def one_of(name: str, value: Any, choices: Iterable[str]) -> str:
    """Return a string that is one of `choices`; ValueError for any other value."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {_said(value)}")
    return value

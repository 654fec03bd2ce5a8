"""The implementation impl="triton": both operators on a GPU, without any wait of the CPU for the device.

A state's buffered tokens come first in one row with the new ones (`continuation`), packed without gaps, and their
outputs are dropped.
"""

# N sequences, T time, C chunk, H heads, G groups, K key, V value
from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, replace
from importlib import metadata, util

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from loglinear.kernels.torch import has_blocks
from loglinear.kernels.unchanging import is_unchanging, is_zero, once, unchanging
from loglinear.ops.continuation import Places, final_state, in_one_row, places_in_one_row, take
from loglinear.ops.problem import MIN_LOG_DECAY, Problem, is_transformed
from loglinear.ops.state import DecodeState, FenwickState
from loglinear.partition import FENWICK

GATES = ("scalar", "diagonal")
OLDEST_TRITON = "3.4"  # 3.3 refuses `prefetch`, whose branches return different types; torch 2.8 brings 3.4


def _triton_version() -> str | None:
    """Return the version of the installed Triton, or None."""
    # The package's metadata contain it; an import takes a second.
    if util.find_spec("triton") is None:
        return None
    for distribution in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return importlib.import_module("triton").__version__


def _no_triton(version: str | None) -> str | None:
    """Return the requirement that this version of Triton does not meet, or None."""
    if version is None:
        return "needs the package triton (it comes with CUDA builds of torch)"
    if TorchVersion(version) < OLDEST_TRITON:
        return f"needs Triton {OLDEST_TRITON} or newer (it comes with torch 2.8), got {version}"
    return None


NO_TRITON = _no_triton(_triton_version())


def availability() -> str:
    """Return the line of `loglinear info` that says if these kernels run on this machine."""
    if NO_TRITON is not None:
        return f"no: it {NO_TRITON}"
    if torch.cuda.is_available():
        return f"yes, on {torch.cuda.get_device_name()}"
    return "no: there is no CUDA GPU"


def unavailable(device: torch.device) -> str | None:
    """Return the reason why no kernel runs on this device, or None."""
    if NO_TRITON is not None:
        return f"impl='triton' {NO_TRITON}; use impl='torch'"
    if device.type != "cuda" and not _is_interpreted():
        return f"impl='triton' needs CUDA tensors, got {device.type}; use impl='torch'"
    return None


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _largest_chunk(p: Problem) -> int:
    from loglinear.kernels.triton import limits

    return limits.largest_chunk((p.q, p.k, p.v), p.partition, p.beta is not None, p.is_diagonal)


def _chunk_size(p: Problem) -> int:
    """Return the chunk size of a call; 0 leaves the choice to the kernels."""
    if p.initial_state is not None or p.output_final_state:
        return p.chunk_size
    return 0 if p.partition == FENWICK else p.partition.chunk_near(p.chunk_size, most=_largest_chunk(p))


def block_size(p: Problem) -> int:
    """Return the chunk size of a call, chosen here."""
    return _chunk_size(p) or min(p.chunk_size, _largest_chunk(p))


def unsupported(p: Problem) -> str | None:
    """Return the reason why these kernels do not support a call and what does; None if they support it."""
    reason = unavailable(p.v.device)
    if reason is not None:
        return reason
    from loglinear.kernels.triton import limits

    reason = limits.of_partition(p.partition)
    if reason is not None:
        return reason
    if _is_interpreted() and torch.bfloat16 in (p.q.dtype, p.k.dtype, p.v.dtype):
        return "Triton's interpreter cannot multiply bfloat16: use float32, or impl='torch'"
    if p.is_float64:
        return "float64 needs impl='torch'"
    if is_transformed():
        return "torch.func transforms and forward-mode derivatives need impl='torch'"
    reason = None if _is_interpreted() else limits.of_small_tiles(p.q, _chunk_size(p), p.is_diagonal)
    return reason or limits.of_heads(p.q.shape[3], p.v.shape[3], p.beta is not None) or _too_long(p)


def unchosen(p: Problem) -> str | None:
    """Return the reason why impl="auto" does not choose these kernels for a call, or None."""
    reason = unsupported(p)
    if reason is not None:
        return reason
    from loglinear.kernels.triton import limits

    return limits.of_automatic_choice(p.is_diagonal, p.beta is not None)


def _too_long(p: Problem) -> str | None:
    """Return the reason why the kernels do not take a call's chunks or so many tokens, or None."""
    from loglinear.kernels.triton import limits

    largest, chunk_size = _largest_chunk(p), _chunk_size(p)
    if chunk_size:
        has_state = p.initial_state is not None or p.output_final_state
        name = "a state with chunk_size" if has_state else f"{p.partition} with chunks of"
        reason = limits.of_chunk(name, chunk_size, largest)
        if reason is not None:
            return reason
    # The scalar gate's plans may choose a chunk half as large.
    smallest = chunk_size or (largest if p.beta is not None else largest // 2)
    rows, tokens = p.v.shape[:2]
    if p.initial_state is None:
        return limits.of_tokens(tokens, smallest, None)
    # All tokens are packed into one row, after the buffered ones.
    return limits.of_tokens(rows * tokens, smallest, p.num_sequences * p.chunk_size)


def unsupported_step(q: Tensor, v: Tensor, state: DecodeState) -> str | None:
    """Return the reason why the kernels do not support a step, as `unsupported` does for calls."""
    reason = unavailable(v.device)
    if reason is not None:
        return reason
    if torch.float64 in (q.dtype, state.fenwick.blocks.dtype):
        return "float64 needs impl='torch'"
    from loglinear.kernels.triton import limits

    s = state.fenwick
    return limits.of_step(s.blocks, s.chunk_size, s.beta is not None, s.is_diagonal)


def with_boundaries(p: Problem) -> Problem:
    """Return the call with int64 boundaries on its device, in a copy unless they are unchanging.

    Forward and backward then share a layout.
    """
    ends, device = p.cu_seqlens, p.v.device
    if ends is None or is_unchanging(ends):
        return p
    copy = not torch.compiler.is_compiling()
    return replace(p, cu_seqlens=unchanging(ends.to(device, torch.int64, non_blocking=True, copy=copy)))


def run(p: Problem) -> tuple[Tensor, FenwickState | None]:
    """Return the output and, if the call asks for it, the final state; ValueError if the call is not supported."""
    reason = unsupported(p)
    if reason is not None:
        raise ValueError(reason)
    from loglinear.kernels.triton import chunkwise

    log_decay = p.log_decay
    if log_decay is None:
        channels = p.q.shape[3:] if p.is_diagonal else ()
        log_decay = p.v.new_zeros(*p.v.shape[:3], *channels, dtype=torch.float32)
    p = with_boundaries(p)
    if p.initial_state is None:
        output, blocks, *_ = chunkwise(
            p.q,
            p.k,
            p.v,
            log_decay,
            p.beta,
            p.level_scales,
            None,
            p.cu_seqlens,
            None,
            p.scale,
            _chunk_size(p),
            p.output_final_state,
            p.partition.numbers,
        )
        if not p.output_final_state:
            return output, None
        clamped = log_decay.clamp(min=MIN_LOG_DECAY)
        tokens = [None if x is None else in_one_row(x, None) for x in (p.k, p.v, clamped, p.beta)]
        return output, final_state(p, blocks, tokens, places_in_one_row(p, p.num_sequences))
    return _continue(p, p.initial_state, log_decay)


@dataclass(frozen=True)
class Continued:
    """The tokens of sequences that continue from a state: buffered and new ones in one row, without gaps.

    A sequence without a token has zeros in place of the buffered ones, which its unfinished chunk begins with.
    """

    ends: Tensor  # [N + 1], the boundaries of the sequences in this row
    starts: Tensor  # [N], the number of the chunk with which each begins
    places: Places  # of the tokens in this row
    apart: Tensor  # the place of each token of the row among all buffered tokens and then all new ones
    real: Tensor  # False for the row's padding
    output: Tensor  # [B T], the place of each new token

    @classmethod
    def of(cls, p: Problem, state: FenwickState) -> Continued:
        """Return the row of a call; the device asserts that no position is too large for a walk."""
        name = ("continued", *p.v.shape[:2], p.chunk_size)
        return once(lambda: cls._of(p, state), name, state.position, p.cu_seqlens)

    @classmethod
    def _of(cls, p: Problem, state: FenwickState) -> Continued:
        from loglinear.kernels.triton.layout import ragged
        from loglinear.kernels.triton.tree import MAX_CHUNKS

        N, C, tokens = p.num_sequences, p.chunk_size, p.v.shape[0] * p.v.shape[1]
        apart = places_in_one_row(p, N)
        buffered, lengths = state.position % C, apart.end - apart.start
        torch._assert_async(
            (apart.end < MAX_CHUNKS * C).all(),
            f"impl='triton' needs positions below {MAX_CHUNKS * C} at chunk size {C}: use impl='torch'",
        )
        ends = torch.nn.functional.pad((buffered + lengths).cumsum(0), (1, 0))
        sequence, offset, real = ragged(buffered + lengths, N * C + tokens)
        position = offset + (state.position - buffered)[sequence]
        source = torch.where(real, Places(*(x[sequence] for x in apart)).of(position, C), 0)
        together = Places(apart.start, apart.end, ends[:-1], ends[:-1] + buffered)
        owner, number, _ = ragged(lengths, tokens)
        output = together.first[owner] + number
        return cls(unchanging(ends), unchanging(state.position // C), together, source, real, output)

    def packed(self, new: Tensor, buffer: Tensor | None = None) -> Tensor:
        """Return buffered tokens, or zeros in place of them, and new ones as the row."""
        new = new.flatten(0, 1)
        if buffer is None or is_zero(buffer):
            return new.new_zeros(len(self.real), *new.shape[1:]).index_copy(0, self.output, new)
        return take(torch.cat([buffer.flatten(0, 1).to(new.dtype), new]), self.apart, self.real)

    def unpacked(self, output: Tensor) -> Tensor:
        """Return the new tokens' part [B T, ...] of a row [1, tokens, ...]."""
        return output[0].index_select(0, self.output)


def _continue(p: Problem, state: FenwickState, log_decay: Tensor) -> tuple[Tensor, FenwickState | None]:
    """Run sequences that continue from a state."""
    from loglinear.kernels.triton import chunkwise

    row, C = Continued.of(p, state), p.chunk_size
    log_decay = log_decay.clamp(min=MIN_LOG_DECAY)
    beta, blocks = None, state.blocks
    if p.beta is not None:
        beta = row.packed(p.beta, state.beta)
        # The first entry of the delta rule's tree reads the prefix even if there is none, so it must be zero.
        if not is_zero(blocks):
            is_past = has_blocks(row.starts, blocks.shape[1], C, p.partition)
            blocks = torch.where(is_past[..., None, None, None], blocks, 0.0)
    written = [row.packed(p.k, state.k), row.packed(p.v, state.v), row.packed(log_decay, state.log_decay), beta]
    output, blocks, *_ = chunkwise(
        row.packed(p.q)[None],
        *(None if x is None else x[None] for x in written),
        row.packed(p.level_scales)[None],
        blocks,
        row.ends,
        row.starts,
        p.scale,
        C,
        p.output_final_state,
        p.partition.numbers,
    )
    output = row.unpacked(output).view(p.v.shape)
    return output, final_state(p, blocks, written, row.places) if p.output_final_state else None

"""The limits of the kernels. A function `of_...` returns the reason why they do not take a call, or None."""

# C chunk, K key, V value, N sequences, M blocks, H heads
from __future__ import annotations

import math

import torch
from torch import Tensor

from loglinear.kernels.triton.delta_rule.products import products_of
from loglinear.kernels.triton.inputs import common_dtype
from loglinear.kernels.triton.tree import MAX_CHUNKS, MAX_RADIX
from loglinear.partition import FENWICK, Partition

MAX_HEAD_DIM = 256
SMALLEST_CHUNK, LARGEST_CHUNK = 16, 128
MAX_NUMBERS = 1 << 31  # in a row's blocks, or pairs of a token and a group; kernels count them in 32 bits
MAX_COLUMNS = 4096  # whose weights a program has in its registers
# Until `pytest -m gpu tests/kernels/test_triton_routed_weights_gpu.py` has passed on one.
WEIGHTS_PASSED_ON_A_GPU = False
# Until `pytest -m gpu tests/kernels/test_triton_diagonal_gpu.py` has passed on one, each for its own family
# (-k "not diagonal_delta_rule", -k diagonal_delta_rule); impl="triton" runs these kernels.
DIAGONAL_GATE_PASSED_ON_A_GPU = False
DIAGONAL_DELTA_RULE_PASSED_ON_A_GPU = False
MAX_SUMS = 1024  # blocks whose scores a program of a step has in its registers


def widest_value(is_delta_rule: bool) -> int:
    """Return the largest V: the delta rule's kernels split it."""
    return 2 * MAX_HEAD_DIM if is_delta_rule else MAX_HEAD_DIM


def of_heads(K: int, V: int, is_delta_rule: bool) -> str | None:
    """Heads of these widths."""
    widest = widest_value(is_delta_rule)
    if K <= MAX_HEAD_DIM and widest >= V:
        return None
    return f"head dims K = {K}, V = {V} need impl='torch': impl='triton' takes up to {MAX_HEAD_DIM} and {widest}"


def of_partition(partition: Partition) -> str | None:
    """A partition."""
    if partition == FENWICK or (partition.radix <= MAX_RADIX and partition.largest_block is None):
        return None
    return f"{partition} needs impl='torch': impl='triton' takes a radix up to {MAX_RADIX} without a largest block"


def of_automatic_choice(is_diagonal: bool, is_delta_rule: bool) -> str | None:
    """A call whose implementation is chosen here, by impl="auto"."""
    if not is_diagonal or (DIAGONAL_DELTA_RULE_PASSED_ON_A_GPU if is_delta_rule else DIAGONAL_GATE_PASSED_ON_A_GPU):
        return None
    return "no GPU has passed all checks of the kernels for a log_decay per key channel: impl='triton' runs them"


def of_small_tiles(q: Tensor, chunk_size: int, is_diagonal: bool) -> str | None:
    """A diagonal gate in the smallest tiles (docs/lab-notes/2026-11-30-diagonal-kernels.md has the error)."""
    if not is_diagonal or q.dtype == torch.bfloat16 or (q.shape[3], chunk_size) != (16, 16):
        return None
    return "K = 16 with a log_decay per key channel in chunks of 16 tokens needs bfloat16 or impl='torch'"


def largest_chunk(
    x: tuple[Tensor, Tensor, Tensor], partition: Partition, is_delta_rule: bool, is_diagonal: bool
) -> int:
    """Return how many tokens a chunk of a call with q, k and v has at most: shared memory limits them."""
    q, k, v = x
    # Three tf32 products take eight times the room of one in bfloat16.
    products = products_of if is_delta_rule else common_dtype
    largest = LARGEST_CHUNK if products(q, k, v) == torch.bfloat16 and not is_diagonal else 64
    largest = largest if max(q.shape[3], v.shape[3]) <= 128 else largest // 2
    if is_delta_rule:
        largest = max(largest, 64)
    # Chunks of 128 are worked on in halves, between which there is one column.
    return min(largest, 64) if partition.radix > 2 and partition.finest_block != LARGEST_CHUNK else largest


def of_chunk(name: str, chunk_size: int, largest: int) -> str | None:
    """A chunk whose size something prescribes, which the name says."""
    if SMALLEST_CHUNK <= chunk_size <= largest:
        return None
    return f"{name} {chunk_size} needs impl='torch': impl='triton' takes {SMALLEST_CHUNK} to {largest} here"


def of_tokens(tokens: int, chunk_size: int, buffered: int | None) -> str | None:
    """A sequence of so many tokens in chunks of at least this size.

    In a call that continues, the tokens of all rows and up to `buffered` earlier ones are one sequence.
    """
    limit = (MAX_CHUNKS - 1) * chunk_size - (buffered or 0)
    if tokens < limit:
        return None
    if buffered is None:
        return f"T = {tokens} needs impl='torch': impl='triton' takes less than {limit} tokens here"
    return f"B T = {tokens} tokens need impl='torch': impl='triton' continues less than {limit} at a time here"


def of_step(blocks: Tensor, chunk_size: int, is_delta_rule: bool, is_diagonal: bool = False) -> str | None:
    """One token more of a state with blocks [N, M, H, K, V]."""
    if is_diagonal:
        return "a step with a log_decay per key channel needs impl='torch': that of impl='triton' takes one per head"
    K, V = blocks.shape[3:]
    if not SMALLEST_CHUNK <= chunk_size <= LARGEST_CHUNK:
        takes = f"impl='triton' takes {SMALLEST_CHUNK} to {LARGEST_CHUNK}"
        return f"a state with chunk_size {chunk_size} needs impl='torch': {takes}"
    return of_row(blocks) or of_heads(K, V, is_delta_rule)


def of_score_step(blocks: Tensor) -> str | None:
    """The scores of one token more, from sums [N, M, G, K, K]."""
    M, K = blocks.shape[1], blocks.shape[4]
    if M > MAX_SUMS:
        return f"sums of {M} blocks need impl='torch': the step of impl='triton' takes up to {MAX_SUMS}"
    return of_row(blocks) or of_heads(K, K, False)


def of_weights(scores: Tensor) -> str | None:
    """The weights that follow from scores [B, T, G, L]."""
    *pairs, columns = scores.shape
    if columns > MAX_COLUMNS:
        return f"L = {columns} columns need impl='torch': the weights of impl='triton' take up to {MAX_COLUMNS}"
    if math.prod(pairs) < MAX_NUMBERS:
        return None
    return f"B T G = {math.prod(pairs)} needs impl='torch': the weights of impl='triton' take less than {MAX_NUMBERS}"


def of_row(blocks: Tensor) -> str | None:
    """The blocks [N, ...] of a row of a decoding state."""
    if (held := blocks.numel() // len(blocks)) < MAX_NUMBERS:
        return None
    return f"a row with {held} numbers in its blocks needs impl='torch': impl='triton' takes less than {MAX_NUMBERS}"

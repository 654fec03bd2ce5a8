"""The products of the delta rule's stages: the dtype of their factors, their precision, the chunk that they allow."""

from __future__ import annotations

import torch
from torch import Tensor

from loglinear.kernels.triton.args import Math
from loglinear.kernels.triton.inputs import DOT_TYPES, common_dtype

# Stages whose error every later chunk has too: three tf32 products.
CARRIED_ON = ("decayed_rows", "chunk_inverse", "chunk_state")


def choose_chunk_size(q: Tensor, k: Tensor, v: Tensor, is_diagonal: bool, prescribed: int) -> int:
    """Return the chunk size of a call; a state prescribes its own (0: none does)."""
    return prescribed or (128 if products_of(q, k, v) == torch.bfloat16 and not is_diagonal else 64)


def products_of(q: Tensor, k: Tensor, v: Tensor, chunk_size: int = 0) -> torch.dtype:
    """Return the key of DOT_TYPES for chunks of this size (0: none is prescribed).

    Some bfloat16 calls are multiplied as float16's are, with float32 states. In chunks of 16 tokens there are many
    states, and each move of one rounds it again. Heads of up to 32 numbers came out wrong as bfloat16 products on
    Hopper with Triton 3.6 (docs/lab-notes/2026-11-24-delta-rule-kernels.md).
    """
    dtype = common_dtype(q, k, v)
    is_narrow = min(q.shape[3], v.shape[3]) <= 32
    return torch.float16 if dtype == torch.bfloat16 and (is_narrow or chunk_size == 16) else dtype


def state_dtype(q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> torch.dtype:
    """Return the dtype of the arrays that are kept for each chunk."""
    return DOT_TYPES[products_of(q, k, v, chunk_size)][0]


def math_of(stage: str, math: Math) -> Math:
    """Return the products of a stage: their dtype and their precision."""
    return math._replace(precision="tf32x3") if stage in CARRIED_ON else math

"""The scores for one token of every row, in one launch: read the sums with its query, then add its key to them.

    score_m = q^T M_m q - n_m / K,    q and k scaled to length 1

n_m counts the tokens of the block from the sequence's first one on. A chunk is one finest block, so block m is column
m + 1, and column 0 has the score 0. When a chunk is full, the sum of
its k k^T joins the blocks as a state of the scalar gate does.

A program reads some rows of every sum of one group. The last program of each row of the batch adds the programs' parts
of the scores, always in the same order.
"""

# N rows, C chunk, M blocks, G groups, K key, L columns; F numbers of a sum that are read together
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.torch import is_traced
from loglinear.kernels.triton.args import DecodeState, Tokens
from loglinear.kernels.triton.decode import (
    begin,
    digit_of,
    is_block,
    is_idle,
    is_last,
    join_blocks,
    load_buffer,
    load_token,
    merged_into,
    own_program,
    token_at,
)
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import ceil_div, tile_width
from loglinear.kernels.triton.step import PLAIN, value_tile
from loglinear.kernels.triton.tree import StateTree
from loglinear.partition import Partition

EPSILON = tl.constexpr(1e-6)
NUMBERS = 4096  # that a program reads together, from all sums
ADDED = tl.constexpr(256)  # columns of all groups whose parts are added together


@triton.jit
def block_tokens(z, first, M: tl.constexpr, C: tl.constexpr, TREE: tl.constexpr):
    """Return the tokens of each of the blocks 0 .. M - 1 after z chunks, from position `first` on; 0 if it is not
    there."""
    m = tl.arange(0, M)
    there = (m < TREE.blocks) & is_block(z, m, TREE)
    size = (tl.zeros([M], tl.int64) + C) << digit_of(m, TREE) * TREE.radix_log
    others = tl.where(there & (m < TREE.blocks - 1), size, 0)
    oldest = z * C - tl.sum(others, 0)
    held = tl.where(there & (m >= TREE.blocks - 1), oldest, others)
    end = z * C - (tl.cumsum(held, 0) - held)
    return tl.maximum(end - tl.maximum(end - held, first), 0)


@launcher
@triton.jit(do_not_specialize=["G", "L"])
def step_kernel(
    q,
    k,
    active,
    state,
    first,
    parts,
    scores,
    tokens,
    G,
    L,
    K: tl.constexpr,
    C: tl.constexpr,
    TREE: tl.constexpr,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Read q, k [N, G, K], change the state, and write scores [N, G, L] and tokens [N, L]. parts: [N, TILES, G, L], not
    read if there is one tile. WIDTH, M and PARTS are powers of two, at least K, the blocks and the tiles."""
    TILES: tl.constexpr = (K + ROWS - 1) // ROWS
    n, g, tile = own_program(G, TILES)
    t = begin(state.position, n)
    place, z, m = (t % C).to(tl.int32), t // C, tl.arange(0, M)
    begun = tl.load(first + n)
    held = block_tokens(z, begun, M, C, TREE)
    has_column = (m < TREE.blocks) & (m + 1 < L)
    if (g == 0) & (tile == 0):
        own = t + 1 - tl.maximum(tl.where(L > 1, z * C, 0), begun)
        tl.store(tokens + n * L, tl.maximum(own, 0))
        tl.store(tokens + n * L + m + 1, held, mask=has_column)
    if is_idle(active, n):
        if tile == 0:
            tl.store(scores + (n * G + g) * L, 0.0)
            tl.store(scores + (n * G + g) * L + m + 1, tl.zeros([M], tl.float32), mask=has_column)
        return

    q_row, k_row, j = token_at(q, n, g), token_at(k, n, g), tl.arange(0, WIDTH)
    q_K, k_K = load_token(q_row, j, j < K), load_token(k_row, j, j < K)
    q_scale, k_scale = tl.rsqrt(tl.sum(q_K * q_K, 0) + EPSILON), tl.rsqrt(tl.sum(k_K * k_K, 0) + EPSILON)
    k_buffer, v_buffer = state.k + (n * C * G + g) * K, state.v + (n * C * G + g) * K
    blocks = state.blocks + (n * TREE.blocks * G + g) * (K * K)
    if tile == 0:
        tl.store(k_buffer + place * (G * K) + j, k_K * k_scale, mask=j < K)
        tl.store(v_buffer + place * (G * K) + j, k_K * k_scale, mask=j < K)

    energies_MF = tl.zeros([M, F], tl.float32)
    for start in range(0, ROWS * K, F):
        own = start + tl.arange(0, F)
        place_F = tile * (ROWS * K) + own  # in a sum [K, K], whose rows follow one another
        inside = (own < ROWS * K) & (place_F < K * K)
        product_F = (
            load_token(q_row, place_F // K, inside) * q_scale * (load_token(q_row, place_F % K, inside) * q_scale)
        )
        sums_MF = tl.load(
            blocks + (m[:, None] * (G * K * K) + place_F[None, :]),
            mask=(held > 0)[:, None] & inside[None, :],
            other=0.0,
        )
        energies_MF += sums_MF * product_F[None, :]
    found = tl.sum(energies_MF, 1)
    if tile == 0:
        found -= held.to(tl.float32) / K
    row = parts + ((n * TILES + tile) * G + g) * L
    tl.store(row, 0.0)
    tl.store(row + m + 1, found, mask=has_column)

    if place == C - 1:
        tl.debug_barrier()  # the sums have been read
        target = merged_into(z, TREE)
        i_R = tile * ROWS + tl.arange(0, ROWS)
        k_R = load_token(k_row, i_R, i_R < K) * k_scale
        for column in range(0, K, BV):
            i_V = column + tl.arange(0, BV)
            k_V = load_token(k_row, i_V, i_V < K) * k_scale
            joined_RV = tl.zeros([ROWS, BV], tl.float32)
            for c in range(0, C, BC):
                left = k_buffer + c * (G * K)
                k_CR = load_buffer(left, G * K, place - c, k_R, tile * ROWS, K, BC, ROWS)
                k_CV = load_buffer(left, G * K, place - c, k_V, column, K, BC, BV)
                joined_RV += tl.dot(tl.trans(k_CR), k_CV, input_precision="tf32x3")
            join_blocks(joined_RV, 0.0, z, target, blocks, G * K * K, tile * ROWS, column, K, K, TREE, ROWS, BV)

    tl.debug_barrier()  # all threads have written their parts
    if is_last(state.position, n, G * TILES):
        if TILES > 1:
            part = tl.arange(0, PARTS)[:, None]
            for start in range(0, G * L, ADDED):
                column = start + tl.arange(0, ADDED)
                inside = (part < TILES) & (column < G * L)[None, :]
                at = parts + ((n * TILES + part) * (G * L) + column[None, :])
                # Other programs wrote them, on other multiprocessors: the cache of this one must not answer.
                total = tl.sum(tl.load(at, mask=inside, other=0.0, cache_modifier=".cg"), 0)
                tl.store(scores + n * G * L + column, total, mask=column < G * L)
        tl.store(state.position + n, t + 1)


STATE = ("position", "blocks", "k_buffer", "v_buffer")


def step(
    q: Tensor,
    k: Tensor,
    active: Tensor | None,
    state: DecodeState,
    first: Tensor,
    num_columns: int,
    partition: Partition,
) -> tuple[Tensor, Tensor]:
    """Return the outputs of `operator`, which itself is called only if something records or transforms the call."""
    arrays = (state.position, state.blocks, state.k, state.v)
    if is_traced() or not all(type(x) in PLAIN for x in (q, k, active, *arrays, first)):
        return operator(q, k, active, *arrays, first, num_columns, partition.numbers)
    torch.autograd.graph.increment_version(arrays)  # as the operator does
    return _run(q, k, active, arrays, first, num_columns, partition)


@torch.library.custom_op("loglinear::bucket_scores_step", mutates_args=STATE)
def operator(
    q: Tensor,
    k: Tensor,
    active: Tensor | None,
    position: Tensor,
    blocks: Tensor,
    k_buffer: Tensor,
    v_buffer: Tensor,
    first: Tensor,
    num_columns: int,
    partition: list[int],
) -> tuple[Tensor, Tensor]:
    """Return the buckets' scores [N,G,L] in float32 and tokens [N,L] for one token of each row, q and k [N,G,K], and
    advance the sums in place. active [N] names the rows that take part (None: all do). Other rows keep their sums and
    have the scores 0. The arrays of the sums are those of a `FenwickState` whose chunks are one finest block, and
    first [N] is its part of this name. `partition` holds the numbers of a `Partition`."""
    return _run(q, k, active, (position, blocks, k_buffer, v_buffer), first, num_columns, Partition.of(partition))


@operator.register_fake
def _(q, k, active, position, blocks, k_buffer, v_buffer, first, num_columns, partition):  # type: ignore[no-untyped-def]
    scores = q.new_empty((*q.shape[:2], num_columns), dtype=torch.float32)
    return scores, position.new_empty((q.shape[0], num_columns))


def _run(
    q: Tensor,
    k: Tensor,
    active: Tensor | None,
    arrays: tuple[Tensor, Tensor, Tensor, Tensor],
    first: Tensor,
    num_columns: int,
    partition: Partition,
) -> tuple[Tensor, Tensor]:
    """Start the kernel."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    active = None if active is None else active.contiguous()
    position, blocks, k_buffer, v_buffer = arrays
    (N, G, K), L, M, C = q.shape, num_columns, blocks.shape[1], k_buffer.shape[1]
    scores = torch.empty((N, G, L), dtype=torch.float32, device=q.device)
    tokens = torch.empty((N, L), dtype=torch.int64, device=q.device)
    rows, M_width = value_tile(N * G, K), tile_width(M)
    tiles = ceil_div(K, rows)
    parts = scores if tiles == 1 else torch.empty((N, tiles, G, L), dtype=torch.float32, device=q.device)
    step_kernel[(N * G * tiles,)](
        Tokens.of(q),
        Tokens.of(k),
        active,
        DecodeState(position, blocks, k_buffer, v_buffer, k_buffer, None, None),  # there is no decay
        first,
        parts,
        scores,
        tokens,
        G,
        L,
        K=K,
        C=C,
        TREE=StateTree.of(partition, C, M),
        WIDTH=tile_width(K),
        M=M_width,
        F=max(8, NUMBERS // M_width),
        ROWS=rows,
        BV=min(64, tile_width(K)),
        BC=min(64, max(16, C)),
        PARTS=1 << (tiles - 1).bit_length(),
        num_stages=1,
        num_warps=4,
    )
    return scores, tokens

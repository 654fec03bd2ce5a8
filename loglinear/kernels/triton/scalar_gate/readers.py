"""The chunks that read one slot, gathered by one program in the order of the sequence.

    dS = sum over the readers z of (Q_z diag(lambda exp(G) P_path))^T dO_z

A diagonal gate's queries have G in them already. Its path is a sum over the chunks between, which the readers
themselves are: so no chunk stores the paths of its reads.
"""

# C chunk, H heads, K key, V value, L levels
from typing import NamedTuple

import triton
import triton.language as tl

from loglinear.kernels.triton.compiler import fresh_arange, prefetched
from loglinear.kernels.triton.levels import load_scale
from loglinear.kernels.triton.tiles import load_rows
from loglinear.kernels.triton.walks import reader_at


class Reader(NamedTuple):
    """One reader of a slot: lambda and G of its tokens, the path from the slot, and the gradient of the log decays
    beyond the slot, for each half."""

    scales: tl.tensor
    G: tl.tensor
    path: tl.tensor
    beyond_0: tl.tensor
    beyond_1: tl.tensor


@triton.jit
def load_reader(
    scales,
    l_t,
    L,
    cumulative,
    reads,
    c,
    first,
    end,
    l,
    h,
    H,
    C: tl.constexpr,
    HALVES: tl.constexpr,
    TREE: tl.constexpr,
):
    """Nothing is computed with its numbers here: that would wait for them."""
    READS: tl.constexpr = TREE.reads
    i, n = tl.arange(0, C), tl.minimum(end - first, C).to(tl.int32)
    G = tl.load(cumulative + (c * H + h) * C + i, mask=i < n, other=0.0)
    path = tl.load(reads.paths + (c * H + h) * READS + l, mask=n > 0, other=0.0)
    beyond_0 = tl.load(reads.beyond + (c * HALVES * H + h) * READS + l, mask=n > 0, other=0.0)
    in_second = n > (C // 2 if HALVES == 2 else C)
    beyond_1 = tl.load(reads.beyond + ((c * HALVES + HALVES - 1) * H + h) * READS + l, mask=in_second, other=0.0)
    return Reader(load_scale(scales + first * l_t, l_t, n, TREE.column + l, L, i), G, path, beyond_0, beyond_1)


@triton.jit
def gather_channels(
    q,
    level_scales,
    do,
    flows,
    chunk,
    readers,
    l,
    behind,
    h,
    sizes,
    scale,
    first_column,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """`gather_readers` of a diagonal gate, whose queries q [B,T,H,K] have decayed since their chunk's start. The sums
    are those for a slot that ends where the first reader begins."""
    c, first, end = chunk.c, chunk.first, chunk.end
    scales = level_scales.data + chunk.b * level_scales.b + h * level_scales.h
    q_rows, do_rows = q.data + chunk.b * q.b + h * q.h, do.data + chunk.b * do.b + h * do.h
    dstate_KV = tl.zeros([BK, BV], tl.float32)
    dlog_K, path_K = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)
    readers = tl.minimum(readers, ((end - first + C - 1) // C).to(tl.int32))
    for reader in range(readers):
        n = tl.minimum(end - first, C).to(tl.int32)
        i, channel = fresh_arange(reader, 1, C), fresh_arange(reader, 2, BK)
        at = reader_at(behind + reader, l, TREE)
        lambdas = load_scale(scales + first * level_scales.t, level_scales.t, n, TREE.column + at, sizes.L, i)
        weight = prefetched(lambdas, level_scales.data.dtype.element_ty) * scale
        q_CK = load_rows(q_rows + first * q.t, q.t, n, 0, C, K, BK, reader).to(MATH.dot)
        do_CV = load_rows(do_rows + first * do.t, do.t, n, first_column, C, V, BV, reader)
        weighted_CV = (do_CV.to(tl.float32) * weight[:, None]).to(MATH.dot)
        read_KV = tl.dot(tl.trans(q_CK), weighted_CV, input_precision=MATH.precision)
        dstate_KV += tl.exp2(path_K)[:, None] * read_KV
        row, inside = (c * sizes.H + h) * K, channel < K
        whole = tl.load(flows.whole + row + channel, mask=inside, other=0.0)
        dlog_K += whole - tl.load(flows.until.data + at * flows.until.plane + row + channel, mask=inside, other=0.0)
        path_K += tl.load(flows.totals + row + channel, mask=inside, other=0.0)
        c += 1
        first += C
    return dstate_KV, dlog_K


@triton.jit
def gather_readers(
    q,
    level_scales,
    do,
    cumulative,
    reads,
    chunk,
    readers,
    l,
    behind,
    h,
    sizes,
    scale,
    first_column,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    HALVES: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """Sum over `readers` chunks from `chunk` on, and of the gradients of log decays beyond the slot. The chunk is that
    many chunks `behind` the slot's first reader, which reads it through candidate l. Without `cumulative` the gate is
    diagonal."""
    if cumulative is None:
        return gather_channels(
            q,
            level_scales,
            do,
            reads,
            chunk,
            readers,
            l,
            behind,
            h,
            sizes,
            scale,
            first_column,
            K,
            V,
            C,
            BK,
            BV,
            TREE,
            MATH,
        )
    else:
        H, b, c, first, end = sizes.H, chunk.b, chunk.c, chunk.first, chunk.end
        scales, l_t, L = level_scales.data + b * level_scales.b + h * level_scales.h, level_scales.t, sizes.L
        q_rows, do_rows = q.data + b * q.b + (h // sizes.R) * q.h, do.data + b * do.b + h * do.h
        dstate_KV = tl.zeros([BK, BV], tl.float32)
        dlog = tl.zeros([], tl.float32)
        readers = tl.minimum(readers, ((end - first + C - 1) // C).to(tl.int32))
        # Vectors are loaded one reader ahead: nothing else would hide their latency.
        stop = tl.where(readers > 0, end, first)
        at = reader_at(behind, l, TREE)
        ahead = load_reader(scales, l_t, L, cumulative, reads, c, first, stop, at, h, H, C, HALVES, TREE)
        for reader in range(readers):
            weight = prefetched(ahead.scales, level_scales.data.dtype.element_ty) * scale
            weight *= tl.exp2(ahead.G + ahead.path)
            beyond = ahead.beyond_0 + ahead.beyond_1
            stop = tl.where(reader + 1 < readers, end, first)
            at = reader_at(behind + reader + 1, l, TREE)
            ahead = load_reader(scales, l_t, L, cumulative, reads, c + 1, first + C, stop, at, h, H, C, HALVES, TREE)
            n = tl.minimum(end - first, C).to(tl.int32)
            q_CK = load_rows(q_rows + first * q.t, q.t, n, 0, C, K, BK).to(MATH.dot)
            do_CV = load_rows(do_rows + first * do.t, do.t, n, first_column, C, V, BV)
            weighted_CV = (do_CV.to(tl.float32) * weight[:, None]).to(MATH.dot)
            dstate_KV += tl.dot(tl.trans(q_CK), weighted_CV, input_precision=MATH.precision)
            dlog += beyond
            c += 1
            first += C
        return dstate_KV, dlog

"""What the delta rule's stages share on the device: a chunk's own matrices, products of blocks, who merges with whom.

Matrices wider than TK are taken in tiles of TK columns. A transition is K x K: products of them go from memory to
memory, tile by tile, so that any K and dtype fits.
"""

# C chunk, K key, V value, i number of an entry in its run, from 1
import triton
import triton.language as tl

from loglinear.kernels.triton.delta_rule.layout import STOREY
from loglinear.kernels.triton.levels import far_classes, load_class_scales, load_scale, near_classes, spread_scales
from loglinear.kernels.triton.tiles import arrived, exponent, head_program, load_block, load_rows, locate, store_block
from loglinear.kernels.triton.walks import READS, walk

# A run is 8 chunks: one program composes them one after the other, and all of them read what lies before the run
# through states that were brought to its first token (`carry`).
BITS = tl.constexpr(STOREY)
RUN = tl.constexpr(1 << STOREY)


@triton.jit
def part_program(table, T, N, H, C: tl.constexpr, PARTS: tl.constexpr, PACKED: tl.constexpr):
    """A program of C / PARTS rows of a chunk and one head: the head and the chunk, what `locate` says of it (without
    the end), how many tokens the chunk has, the part's first row, and how many tokens the part has: 0 perhaps, of a
    chunk that has some."""
    _, h, number = head_program(1, H)
    part, c = number % PARTS, (number // PARTS).to(tl.int64)
    b, first, end, z, z0, sequence = locate(c, table, T, N, C, PACKED)
    n_keys, skipped = tl.minimum(end - first, C).to(tl.int32), part * (C // PARTS)
    n = tl.maximum(tl.minimum(n_keys - skipped, C // PARTS), 0)
    return h, c, b, first, z, z0, sequence, n_keys, skipped, n


@triton.jit
def key_products(
    k_rows, k_t, n, others, others_n,
    K: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """K K'^T of C tokens each."""
    keys_CC = tl.zeros([C, C], tl.float32)
    for kt in tl.static_range(0, K, TK):
        k_CT = load_rows(k_rows, k_t, n, kt, C, K, TK).to(DOT)
        others_CT = load_rows(others, k_t, others_n, kt, C, K, TK).to(DOT)
        keys_CC = tl.dot(k_CT, tl.trans(others_CT), keys_CC, input_precision=PRECISION)
    return keys_CC


@triton.jit
def query_products(
    q_rows, k_rows, q_t, k_t, n, n_keys,
    K: tl.constexpr, I: tl.constexpr, C: tl.constexpr, TK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Q K^T of I rows of queries and a chunk's keys."""
    scores_IC = tl.zeros([I, C], tl.float32)
    for kt in tl.static_range(0, K, TK):
        q_IT = load_rows(q_rows, q_t, n, kt, I, K, TK).to(DOT)
        k_CT = load_rows(k_rows, k_t, n_keys, kt, C, K, TK).to(DOT)
        scores_IC = tl.dot(q_IT, tl.trans(k_CT), scores_IC, input_precision=PRECISION)
    return scores_IC


@triton.jit
def chunk_scales(
    scales, l_t, n, L, i,
    DTYPE: tl.constexpr, C: tl.constexpr, LINEAR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """LAM of the rows i of one chunk and head, its lower triangle; scales: of the chunk's first token, which has n."""
    j = tl.arange(0, C)
    lambdas = load_class_scales(scales, l_t, n, L, 0, i, LINEAR)
    near_JC, far_JC = near_classes(C).to(tl.float32).to(DOT), far_classes(C).to(tl.float32).to(DOT)
    scales_IC = spread_scales(lambdas, near_JC, far_JC, i, DTYPE, C, LINEAR, DOT, PRECISION)
    if C > 64:  # the second half of the chunk reads the first at one level
        across = arrived(load_scale(scales, l_t, n, 7, L, i), DTYPE)
        scales_IC = tl.where((i >= 64)[:, None] & (j < 64)[None, :], across[:, None], scales_IC)
    return tl.where(i[:, None] >= j[None, :], scales_IC, 0.0)


@triton.jit
def decay(G_rows, G, i, C: tl.constexpr):
    """dec[i, j] = exp(G_i - G_j) for i >= j, else 0; G in base 2."""
    return tl.where(i[:, None] >= tl.arange(0, C)[None, :], tl.exp2(G_rows[:, None] - G[None, :]), 0.0)


@triton.jit
def load_strength(beta, beta_t, n, C: tl.constexpr):
    """beta of a chunk's tokens, 0 behind them."""
    i = tl.arange(0, C)
    return tl.load(beta + i * beta_t, mask=i < n, other=0.0).to(tl.float32)


@triton.jit
def load_decays(cumulative, C: tl.constexpr):
    """G, and its last value Gam."""
    i = tl.arange(0, C)
    G = tl.load(cumulative + i)
    return G, tl.sum(tl.where(i == C - 1, G, 0.0), 0)


@triton.jit
def num_merges(i, rel):
    """With how many blocks on its left an entry merges: those of 1, 2, 4 .. entries, and from 2**rel on the prefix."""
    t = exponent((i & -i) + tl.zeros([], tl.int32))
    return tl.minimum(t, rel) + ((t >= rel) & (i > (1 << rel))).to(tl.int32)


@triton.jit
def real_merges(i, z, z0, rel, shift):
    """How many of them are with blocks of the sequence's own chunks, from z0 on, and not with nodes: the first ones."""
    merges = tl.zeros([], tl.int32)
    for m in range(num_merges(i, rel)):
        merges += (z - (1 << (shift + m)) >= z0).to(tl.int32)
    return merges


@triton.jit
def levels_below(cap, storey):
    """How many levels of a storey lie below the cap."""
    return tl.minimum(tl.maximum(cap - BITS * storey, 0), BITS)


@triton.jit
def node_row(z, z0, sequence, cap):
    """The node that ends with chunk z < z0 of a continued sequence; -1 where none does."""
    m = tl.minimum(exponent((z + 1) & -(z + 1)), cap)
    is_node = (z >= 0) & (((z0 >> m) << m) == z + 1)
    return tl.where(is_node, sequence.to(tl.int64) * (cap + 1) + m, -1)


@triton.jit
def multiply(x, y, out, K: tl.constexpr, TK: tl.constexpr, PRECISION: tl.constexpr):
    """out = x y of K x K matrices in memory. Everything that this program wrote before is seen; `out` is not."""
    tl.debug_barrier()
    for i in range(0, K, TK):
        for j in range(0, K, TK):
            tile = tl.zeros([TK, TK], tl.float32)
            for s in range(0, K, TK):
                x_TT, y_TT = load_block(x, i, s, K, K, TK, TK), load_block(y, s, j, K, K, TK, TK)
                tile = tl.dot(x_TT, y_TT, tile, input_precision=PRECISION)
            store_block(out, i, j, tile, K, K, TK, TK)


@triton.jit
def copy(x, out, K: tl.constexpr, TK: tl.constexpr):
    """out = x of K x K matrices in memory."""
    tl.debug_barrier()
    for i in range(0, K, TK):
        for j in range(0, K, TK):
            store_block(out, i, j, load_block(x, i, j, K, K, TK, TK), K, K, TK, TK)


@triton.jit
def store_identity(out, K: tl.constexpr, TK: tl.constexpr):
    x = tl.arange(0, TK)
    for i in range(0, K, TK):
        for j in range(0, K, TK):
            tile = ((i + x)[:, None] == (j + x)[None, :]).to(tl.float32)
            store_block(out, i, j, tile, K, K, TK, TK)


@triton.jit
def reads_of(z, z0, cap):
    """The candidates that chunk z reads, as bits."""
    read, _, _ = walk(z, z0, cap, BITS)
    return tl.sum(tl.where(read, 1 << tl.arange(0, READS), 0), 0)


@triton.jit
def column_of_read(l, cap, LOW: tl.constexpr):
    """The column of carried states, of candidates from LOW on, that candidate l is summed into."""
    return tl.minimum(l, tl.maximum(cap, LOW)) - LOW


@triton.jit
def reads_of_column(reads, column, cap, LOW: tl.constexpr):
    """The candidates among `reads` that are summed into a column: all from the cap on in one."""
    at = tl.minimum(column + LOW, 31)
    return (reads >> at & tl.where(at < tl.maximum(cap, LOW), 1, -1)) << at


@triton.jit
def columns_of(reads, cap, LOW: tl.constexpr):
    """The columns of carried states that are read, as bits."""
    high, last = reads >> LOW, tl.minimum(tl.maximum(cap - LOW, 0), READS)
    return (high & ((1 << last) - 1)) | ((high >> last) > 0).to(tl.int32) << last


@triton.jit
def count_bits(x):
    """Of x < 2**16."""
    return tl.sum((x >> tl.arange(0, READS)) & 1, 0)

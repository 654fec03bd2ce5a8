"""lambda and its gradient inside a chunk, and of the walk's reads."""

# i row, j column of a chunk's tile, c class of columns, l candidate read, L levels
import triton
import triton.language as tl

from loglinear.kernels.triton.compiler import prefetch, prefetched
from loglinear.kernels.triton.tiles import dot_float32, exponent


@triton.jit
def load_scale(base, stride, n, column, L, i):
    """lambda of one level for each row, clamped to the last level: [rows], loaded ahead."""
    return prefetch(base + (i * stride + tl.minimum(column, L - 1)), i < n)


@triton.jit
def load_read_scales(base, stride, n, reads, L, i, TREE: tl.constexpr):
    """lambda of each candidate that is read, else 0: [rows, reads], loaded ahead. reads: the candidates' bits."""
    l = tl.arange(0, TREE.reads)
    columns = tl.minimum(TREE.column + l, L - 1)[None, :]
    return prefetch(base + ((i * stride)[:, None] + columns), (i < n)[:, None] & (((reads >> l) & 1) > 0)[None, :])


@triton.jit
def scales_product(scales, y, DTYPE: tl.constexpr, MATH: tl.constexpr):
    """scales @ y of a [rows, 16] tile of lambdas that were loaded ahead from an array of DTYPE, and are not rounded."""
    x = prefetched(scales, DTYPE)
    if MATH.dot == DTYPE:
        return tl.dot(x.to(MATH.dot), y, input_precision=MATH.precision)
    else:
        return dot_float32(x, y, MATH)


@triton.jit
def column_of(x, l, COLUMNS: tl.constexpr):
    """Column l of a [rows, COLUMNS] tile."""
    return tl.sum(tl.where(tl.arange(0, COLUMNS)[None, :] == l, x, 0.0), 1)


# With radix 2 column(i, j) = max(0, bit_length(i XOR j) - log2 f), which is the level where f is 1. Over
# a tile it would take a comparison and a choice for each level and place. But in a row levels up to 3, inside aligned
# blocks of 8, depend on j mod 8 alone, and farther ones on j's block of 8. So a row needs 16 classes of columns, 8 near
# and 8 far ones. Products with their indicators spread a [row, class] tile to all columns, and fold sums over columns
# into one. In tiles of more than 64 columns that serves each 64 on the diagonal. With larger radices the columns of a
# tile are computed, and their lambdas are loaded one by one.


@triton.jit
def class_levels(i, TREE: tl.constexpr):
    """[i, c]: the column of class c for row i; -1 for the block of 8 that i itself lies in."""
    c = tl.arange(0, 16)[None, :]
    near = tl.maximum(exponent((i % 8)[:, None] ^ c) + 1, 0)
    far = tl.maximum(exponent((i // 8 % 8)[:, None] ^ (c - 8)) + 4, -1)
    levels = tl.where(c < 8, near, far)
    if TREE.finest_log > 0:
        levels = tl.where(levels < 0, levels, tl.maximum(levels - TREE.finest_log, 0))
    return levels


@triton.jit
def reads_class(i):
    """[i, c]: does row i read a column of class c? Others lie behind it, and their lambda is not its own."""
    c = tl.arange(0, 16)[None, :]
    return tl.where(c < 8, c <= (i % 8)[:, None], c - 8 < (i // 8 % 8)[:, None])


@triton.jit
def near_classes(COLUMNS: tl.constexpr):
    """[j, c]: is j mod 8 = c?"""
    return (tl.arange(0, COLUMNS) % 8)[:, None] == tl.arange(0, 16)[None, :]


@triton.jit
def far_classes(COLUMNS: tl.constexpr):
    """[j, c]: is j in block c - 8 of its 64?"""
    return (tl.arange(0, COLUMNS) // 8 % 8)[:, None] == (tl.arange(0, 16) - 8)[None, :]


@triton.jit
def is_near(i, COLUMNS: tl.constexpr):
    """[i, j]: are they in one aligned block of 8?"""
    return (i[:, None] ^ tl.arange(0, COLUMNS)[None, :]) < 8


@triton.jit
def load_class_scales(base, stride, n, L, level, i, ONE_LEVEL: tl.constexpr, TREE: tl.constexpr):
    """lambda of the classes that each row reads, else 0: [i, c], loaded ahead. ONE_LEVEL: the whole tile is at column
    `level`, [i]. With a larger radix the address of all, which `spread_scales` loads."""
    if ONE_LEVEL:
        return load_scale(base, stride, n, level, L, i)
    elif TREE.radix_log > 1:
        return base
    else:
        columns = tl.minimum(tl.maximum(class_levels(i, TREE), 0), L - 1)
        return prefetch(base + ((i * stride)[:, None] + columns), (i < n)[:, None] & reads_class(i))


@triton.jit
def columns_between(i, J: tl.constexpr, TREE: tl.constexpr):
    """[i, j]: the column in which place i of a chunk reads place j of J; any number where j > i."""
    return digit_column((i >> TREE.finest_log)[:, None], (tl.arange(0, J) >> TREE.finest_log)[None, :], TREE)


@triton.jit
def digit_column(a, b, TREE: tl.constexpr):
    """The column in which finest block a reads finest block b of its chunk; any number where b > a."""
    if TREE.radix_log == 1:
        return exponent(a ^ b) + 1
    else:
        digit = tl.maximum(exponent(a ^ b), 0) // TREE.radix_log  # the highest that differs
        return digit * TREE.others + (a >> digit * TREE.radix_log) - (b >> digit * TREE.radix_log)


@triton.jit
def gather_scales(base, stride, n, L, i, J: tl.constexpr, TREE: tl.constexpr):
    """LAM[i, j] = lambda[i, column(i, j)], 0 where j > i, loaded one by one."""
    columns = tl.minimum(tl.maximum(columns_between(i, J, TREE), 0), L - 1)
    is_read = (i < n)[:, None] & (tl.arange(0, J)[None, :] <= i[:, None])
    return tl.load(base + ((i * stride)[:, None] + columns), mask=is_read, other=0.0).to(tl.float32)


@triton.jit
def spread_scales(
    scales,
    stride,
    n,
    L,
    near_JC,
    far_JC,
    i,
    DTYPE: tl.constexpr,
    J: tl.constexpr,
    ONE_LEVEL: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """LAM[i, j] = lambda[i, column(i, j)] from scales of `load_class_scales`, whose array has DTYPE. Whoever takes it
    has to leave out j > i."""
    if ONE_LEVEL:
        return prefetched(scales, DTYPE)[:, None]
    elif TREE.radix_log > 1:
        return gather_scales(scales, stride, n, L, i, J, TREE)
    else:
        near = scales_product(scales, tl.trans(near_JC), DTYPE, MATH)
        far = scales_product(scales, tl.trans(far_JC), DTYPE, MATH)
        return tl.where(is_near(i, J), near, far)


@triton.jit
def level_sums(x, near_JC, far_JC, i, J: tl.constexpr, MATH: tl.constexpr):
    """Sums of x [i, j] over the columns of each class [i, c]."""
    near = tl.where(is_near(i, J), x, 0.0)
    sums_IC = tl.dot(x.to(MATH.dot), far_JC, input_precision=MATH.precision)
    return tl.dot(near.to(MATH.dot), near_JC, sums_IC, input_precision=MATH.precision)


@triton.jit
def by_level(sums, i, L, J: tl.constexpr, COLUMNS: tl.constexpr, TREE: tl.constexpr):
    """[i, column] from sums over classes; columns from the last on are summed into it."""
    level_IC, column = class_levels(i, TREE), tl.arange(0, 16)[None, :]
    gradients, past = tl.zeros([J, 16], tl.float32), tl.zeros([J], tl.float32)
    for level in tl.static_range(COLUMNS):
        past = tl.where(level > L - 1, past, 0.0) + tl.sum(tl.where(level_IC == level, sums, 0.0), 1)
        gradients = tl.where(column == tl.minimum(level, L - 1), past[:, None], gradients)
    return gradients


@triton.jit
def store_sums(
    to,
    stride,
    n,
    L,
    x,
    scale,
    to_last,
    i,
    J: tl.constexpr,
    COLUMNS: tl.constexpr,
    TREE: tl.constexpr,
):
    """Sums of x [i, j] over each of the chunk's own COLUMNS, times scale. to_last: to add to the last one, or None."""
    columns, past = columns_between(i, J, TREE), tl.zeros([J], tl.float32)
    for column in range(COLUMNS):
        past = tl.where(column > L - 1, past, 0.0) + tl.sum(tl.where(columns == column, x, 0.0), 1) * scale
        if to_last is not None:
            past += tl.where(column == tl.minimum(L, COLUMNS) - 1, to_last, 0.0)
        tl.store(to + (i * stride + tl.minimum(column, L - 1)), past.to(to.dtype.element_ty), mask=i < n)


@triton.jit
def store_column_sums(
    to,
    stride,
    n,
    L,
    x,
    scale,
    near_JC,
    far_JC,
    i,
    J: tl.constexpr,
    COLUMNS: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """dlambda of the chunk's own COLUMNS from the gradients x [i, j] of LAM / scale, which are 0 where j > i."""
    if TREE.radix_log == 1:
        sums_IC = level_sums(x, near_JC, far_JC, i, J, MATH) * scale
        column = tl.arange(0, 16)[None, :]
        tl.store(
            to + ((i * stride)[:, None] + column),
            by_level(sums_IC, i, L, J, COLUMNS, TREE).to(to.dtype.element_ty),
            mask=(i < n)[:, None] & (column < tl.minimum(L, COLUMNS)),
        )
    else:
        store_sums(to, stride, n, L, x, scale, None, i, J, COLUMNS, TREE)

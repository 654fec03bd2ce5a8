"""The block states that a sequence leaves at the start of its unfinished chunk: the reads of that chunk, with X = I.

blocks[place] = Y[slot] + F R[column],   each where there is one
dY[slot] += dblocks,   dR[column] += F^T dblocks,   dF += sum over the columns of dblocks R^T
"""

# N sequences, M blocks of a state, H heads, K key, V value
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import Place
from loglinear.kernels.triton.delta_rule.carry_in import store_read
from loglinear.kernels.triton.delta_rule.carry_in_backward import add_back_through, add_outer
from loglinear.kernels.triton.delta_rule.reads import columns_read, is_column_read, is_slot_read, older_column
from loglinear.kernels.triton.delta_rule.states import SIZES, Inputs, Past, PastGradients, TierSizes
from loglinear.kernels.triton.delta_rule.tiles import place_in_run
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.tiles import head_program, load_block, store_block


@triton.jit
def entry_of_end(sequence, ends, first_runs, N, TREE: tl.constexpr):
    """The place of a sequence's unfinished chunk as an entry. ends: [N, 3] int32 of packed sequences, or None."""
    if ends is not None:
        row = tl.load(ends + sequence * 3).to(tl.int64)
        z, z0 = tl.load(ends + sequence * 3 + 1), tl.load(ends + sequence * 3 + 2)
    else:
        row = (sequence + 1).to(tl.int64) * N - 1
        z, z0 = N - tl.full([], 1, tl.int32), tl.zeros([], tl.int32)
    return place_in_run(Place(row, z, z0, sequence), first_runs, N, TREE)


@launcher
@triton.jit(do_not_specialize=SIZES)
def final_blocks_kernel(
    past,
    blocks,
    ends,
    first_runs,
    H,
    per_row,
    cap,
    num_slots,
    columns,
    collapsed,
    first_block,
    places,
    K: tl.constexpr,
    V: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One block of a sequence's final state, one head, one tile of V: blocks [N, M, H, K, V]."""
    tier = TierSizes(H, per_row, cap, num_slots, columns, collapsed, first_block, places)
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, part = head_program(TILES, tier.H)
    place, sequence = part % places, part // places
    entry = entry_of_end(sequence, ends, first_runs, per_row, TREE)
    out = blocks + ((sequence.to(tl.int64) * places + place) * tier.H + h) * (K * V)
    store_read(past, out, entry, place, h, tile * BV, tier, K, V, TK, BV, TREE, MATH)


@triton.jit
def add_to_block(
    out, total, row, column, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    total += load_block(out, row, column, HEIGHT, WIDTH, ROWS, COLUMNS).to(tl.float32)
    store_block(out, row, column, total, HEIGHT, WIDTH, ROWS, COLUMNS)


@launcher
@triton.jit(do_not_specialize=SIZES)
def final_states_backward_kernel(
    past,
    dblocks,
    dpast,
    ends,
    first_runs,
    H,
    per_row,
    cap,
    num_slots,
    columns,
    collapsed,
    first_block,
    places,
    K: tl.constexpr,
    V: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One block of a sequence's final state, one head, one [TK, BV] tile: adds to dY and dR."""
    tier = TierSizes(H, per_row, cap, num_slots, columns, collapsed, first_block, places)
    ROWS: tl.constexpr = (K + TK - 1) // TK
    TILES: tl.constexpr = (V + BV - 1) // BV
    tile, h, part = head_program(ROWS * TILES, tier.H)
    place, sequence = part % places, part // places
    entry = entry_of_end(sequence, ends, first_runs, per_row, TREE)
    dstate = dblocks + ((sequence.to(tl.int64) * places + place) * tier.H + h) * (K * V)
    a, column = tile // TILES * TK, tile % TILES * BV
    if is_slot_read(entry.i, place, num_slots, TREE):
        dstate_TV = load_block(dstate, a, column, K, V, TK, BV).to(tl.float32)
        to_slot = dpast.kept + ((entry.row * num_slots + place) * tier.H + h) * (K * V)
        add_to_block(to_slot, dstate_TV, a, column, K, V, TK, BV)
    older, row = older_column(place, tier), entry.row * tier.H + h
    is_carried = is_column_read(entry.number, tl.maximum(older, 0), columns, past.initial, TREE)
    if (older >= 0) & (is_carried > 0):
        dstate_TV, is_first = tl.zeros([TK, BV], tl.float32), entry.i == entry.start
        dstate_TV = add_back_through(dstate_TV, past, row, dstate, is_first, a, column, K, V, TK, BV, MATH)
        to_column = dpast.carried + ((entry.run.to(tl.int64) * columns + older) * tier.H + h) * (K * V)
        add_to_block(to_column, dstate_TV, a, column, K, V, TK, BV)


@launcher
@triton.jit(do_not_specialize=SIZES)
def final_prefixes_backward_kernel(
    past,
    dblocks,
    dpast,
    ends,
    first_runs,
    H,
    per_row,
    cap,
    num_slots,
    columns,
    collapsed,
    first_block,
    places,
    K: tl.constexpr,
    V: tl.constexpr,
    TK: tl.constexpr,
    BV: tl.constexpr,
    TREE: tl.constexpr,
    MATH: tl.constexpr,
):
    """One sequence's end, one head, one [TK, TK] tile: adds to dF."""
    tier = TierSizes(H, per_row, cap, num_slots, columns, collapsed, first_block, places)
    TILES: tl.constexpr = (K + TK - 1) // TK
    tile, h, sequence = head_program(TILES * TILES, tier.H)
    entry = entry_of_end(sequence, ends, first_runs, per_row, TREE)
    if entry.i == entry.start:
        return
    a, column = tile // TILES * TK, tile % TILES * TK
    dprefix_TT = add_outer(
        tl.zeros([TK, TK], tl.float32),
        dblocks + (sequence.to(tl.int64) * places * tier.H + h) * (K * V),
        past.carried + (entry.run.to(tl.int64) * columns * tier.H + h) * (K * V),
        columns_read(entry.number, columns, past.initial, TREE),
        a,
        column,
        tier,
        K,
        V,
        TK,
        BV,
        TREE,
        MATH,
    )
    add_to_block(dpast.prefixes + (entry.row * tier.H + h) * (K * K), dprefix_TT, a, column, K, K, TK, TK)


def final_blocks(x: Inputs, past: Past) -> Tensor:
    """[N, M, H, K, V] float32: what each sequence leaves at the start of its unfinished chunk. past: of the chunks."""
    y, M = x.layout, x.sizes.cap + 1
    blocks = x.empty(y.sequences, M, x.heads, x.key_dim, x.value_dim)
    final_blocks_kernel[(y.sequences * M * x.heads * x.tiling.tiles("carry_in"),)](
        past, blocks, y.ends, y.first_runs, *x.tier_sizes(y.tiers[0], M), TREE=x.tree, **x.constants("carry_in")
    )
    return blocks


def final_blocks_backward(x: Inputs, past: Past, dblocks: Tensor, dpast: PastGradients) -> None:
    """Add to the gradients of the chunks' past."""
    y, M, dblocks = x.layout, x.sizes.cap + 1, dblocks.contiguous()
    sizes = (y.ends, y.first_runs, *x.tier_sizes(y.tiers[0], M))
    final_states_backward_kernel[(y.sequences * M * x.heads * x.tiling.all_tiles("carry_in_states_backward"),)](
        past, dblocks, dpast, *sizes, TREE=x.tree, **x.constants("carry_in_states_backward")
    )
    final_prefixes_backward_kernel[(y.sequences * x.heads * x.tiling.square_tiles("carry_in_prefixes_backward"),)](
        past, dblocks, dpast, *sizes, TREE=x.tree, **x.constants("carry_in_prefixes_backward")
    )

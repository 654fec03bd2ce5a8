"""The block states that a sequence leaves at the start of its unfinished chunk: one more walk, with X = I.

blocks[m] = sum over the reads of chunk floor(T / C) that are stored under m of P_path S_block
"""

# H heads, E numbers of a state in one tile
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.triton.args import SIZES, Place, Sizes
from loglinear.kernels.triton.launcher import launcher
from loglinear.kernels.triton.launches import ceil_div
from loglinear.kernels.triton.scalar_gate.states import Inputs, StateGradients, States
from loglinear.kernels.triton.tiles import head_program
from loglinear.kernels.triton.walks import block_row, end_of, initial_number, paths, slot_pointer


@triton.jit
def place_of_end(sequence, ends, sizes, C: tl.constexpr):
    """The place of the chunk behind the last complete one. ends: [N, 3] int32 of packed sequences, None for a batch."""
    if ends is not None:
        origin = tl.load(ends + sequence * 3).to(tl.int64)
        z, z0 = tl.load(ends + sequence * 3 + 1), tl.load(ends + sequence * 3 + 2)
    else:
        origin, z, z0 = sequence.to(tl.int64) * sizes.N, sizes.T // C, tl.full([], 0, tl.int32)
    return Place(origin + z, z, z0, sequence)


@launcher
@triton.jit(do_not_specialize=SIZES)
def final_blocks_kernel(
    states,
    blocks,
    ends,
    T,
    N,
    H,
    R,
    L,
    cap,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    TREE: tl.constexpr,
):
    """One tile of one block of one sequence and head: blocks [sequence, cap + 1, H, SIZE]."""
    sizes = Sizes(T, N, H, R, L, cap)
    TILES: tl.constexpr = (SIZE + E - 1) // E
    tile, h, block = head_program(TILES, sizes.H)
    m = block % (cap + 1)
    place = place_of_end(block // (cap + 1), ends, sizes, C)
    read, path = paths(states.log_decay, place, sizes, h, TREE)
    x, l_R = tile * E + tl.arange(0, E), tl.arange(0, TREE.reads)
    total = tl.zeros([E], tl.float32)
    for l in range(m, tl.where(m == cap, TREE.reads, m + 1)):
        decay = tl.sum(tl.where(read & (l_R == l), tl.exp2(path), 0.0), 0)
        if decay > 0:
            state = slot_pointer(states, place, l, sizes, h, SIZE, TREE)
            total += decay * tl.load(state + x, mask=x < SIZE, other=0.0).to(tl.float32)
    out = blocks + block_row(place.sequence, m, sizes, h) * SIZE
    tl.store(out + x, total.to(blocks.dtype.element_ty), mask=x < SIZE)


@launcher
@triton.jit(do_not_specialize=SIZES)
def final_blocks_backward_kernel(
    states,
    dblocks,
    dstates,
    ends,
    T,
    N,
    H,
    R,
    L,
    cap,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    TREE: tl.constexpr,
):
    """One sequence and head: adds to the gradients of the states that it left, and of the log decays of blocks."""
    sizes = Sizes(T, N, H, R, L, cap)
    pid = tl.program_id(0)
    h = pid % sizes.H
    place = place_of_end(pid // sizes.H, ends, sizes, C)
    read, path = paths(states.log_decay, place, sizes, h, TREE)
    l_R = tl.arange(0, TREE.reads)
    dlog_R = tl.zeros_like(path)
    for l in range(TREE.reads):
        decay = tl.sum(tl.where(read & (l_R == l), tl.exp2(path), 0.0), 0)
        if decay > 0:
            block = dblocks + block_row(place.sequence, tl.minimum(l, cap), sizes, h) * SIZE
            row = block_row(place.sequence, initial_number(place, l, cap, TREE), sizes, h)
            state = slot_pointer(states, place, l, sizes, h, SIZE, TREE)
            end = end_of(place.z, l, TREE)
            slot = place.c - place.z + end - 1
            is_initial = end <= place.z0
            for first in range(0, SIZE, E):
                x = first + tl.arange(0, E)
                pulled = decay * tl.load(block + x, mask=x < SIZE, other=0.0).to(tl.float32)
                kept = tl.load(state + x, mask=x < SIZE, other=0.0).to(tl.float32)
                dlog_R += tl.where(l_R == l, tl.sum(pulled * kept, 0), 0.0)
                if states.initial is not None:
                    to_initial = dstates.initial + row * SIZE + x
                    mask = x < tl.where(is_initial, SIZE, 0)
                    tl.store(to_initial, tl.load(to_initial, mask=mask, other=0.0) + pulled, mask=mask)
                to_slot = dstates.slots + (slot * sizes.H + h) * SIZE + x
                mask = x < tl.where(is_initial, 0, SIZE)
                pulled += tl.load(to_slot, mask=mask, other=0.0).to(tl.float32)
                tl.store(to_slot, pulled.to(dstates.slots.dtype.element_ty), mask=mask)
    beyond = tl.cumsum(dlog_R, 0, reverse=True) - dlog_R
    end = end_of(place.z, l_R, TREE)
    to = dstates.log_decay + (place.c - place.z + end - 1) * sizes.H + h
    mask = read & (end > place.z0)
    tl.store(to, tl.load(to, mask=mask, other=0.0) + beyond, mask=mask)


def final_blocks(x: Inputs, states: States) -> Tensor:
    """[N, M, H, K, V] float32: what each sequence leaves at the start of its unfinished chunk."""
    y, M, (sizes, size) = x.layout, x.sizes.cap + 1, x.parts
    blocks = x.empty(y.sequences, M, x.heads, x.key_dim, x.value_dim)
    grid = y.sequences * M * sizes.H * ceil_div(size, x.elements)
    final_blocks_kernel[(grid,)](states, blocks, y.ends, *sizes, SIZE=size, E=x.elements, C=x.chunk_size, TREE=x.tree)
    return blocks


def final_blocks_backward(x: Inputs, states: States, dblocks: Tensor, dstates: StateGradients) -> None:
    """Add to the gradients of the array's slots."""
    sizes, size = x.parts
    final_blocks_backward_kernel[(x.layout.sequences * sizes.H,)](
        states,
        dblocks.contiguous(),
        dstates,
        x.layout.ends,
        *sizes,
        SIZE=size,
        E=x.elements,
        C=x.chunk_size,
        TREE=x.tree,
    )

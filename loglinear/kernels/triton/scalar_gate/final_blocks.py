"""The block states that a sequence leaves at the start of its unfinished chunk: one more walk, with X = I.

blocks[m] = sum over the reads of chunk floor(T / C) that are stored under m of P_path S_block
"""

# H heads, E numbers of a state in one tile
import triton
import triton.language as tl

from loglinear.kernels.triton.tiles import SIZES, head_program
from loglinear.kernels.triton.walks import READS, paths, slot_pointer


@triton.jit
def locate_end(sequence, ends, T, N, C: tl.constexpr, PACKED: tl.constexpr):
    """Row that the chunk behind the last complete one would have, its number, and the first chunk."""
    if PACKED:
        origin = tl.load(ends + sequence * 3).to(tl.int64)
        z, z0 = tl.load(ends + sequence * 3 + 1), tl.load(ends + sequence * 3 + 2)
    else:
        origin, z, z0 = sequence.to(tl.int64) * N, T // C, 0
    return origin + z, z, z0


@triton.jit(do_not_specialize=SIZES)
def final_blocks_kernel(
    slots, nodes, log_p, blocks, ends,
    T, N, H, cap,
    SIZE: tl.constexpr, E: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One tile of one block of one sequence and head: blocks [sequence, cap + 1, H, SIZE]."""
    TILES: tl.constexpr = (SIZE + E - 1) // E
    tile, h, block = head_program(TILES, H)
    m, sequence = block % (cap + 1), block // (cap + 1)
    c, z, z0 = locate_end(sequence, ends, T, N, C, PACKED)
    read, path = paths(log_p, c, z, z0, cap, h, H)
    x, l_R = tile * E + tl.arange(0, E), tl.arange(0, READS)
    total = tl.zeros([E], tl.float32)
    for l in range(m, tl.where(m == cap, READS, m + 1)):
        decay = tl.sum(tl.where(read & (l_R == l), tl.exp2(path), 0.0), 0)
        if decay > 0:
            state = slot_pointer(slots, nodes, c, z, z0, sequence, l, cap, h, H, SIZE, NODES)
            total += decay * tl.load(state + x, mask=x < SIZE, other=0.0).to(tl.float32)
    out = blocks + ((sequence.to(tl.int64) * (cap + 1) + m) * H + h) * SIZE
    tl.store(out + x, total.to(blocks.dtype.element_ty), mask=x < SIZE)


@triton.jit(do_not_specialize=SIZES)
def final_blocks_backward_kernel(
    slots, nodes, log_p, dblocks, dslots, dnodes, dlog_p, ends,
    T, N, H, cap,
    SIZE: tl.constexpr, E: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One sequence and head: adds to the gradients of the states that it left, and of their log P."""
    pid = tl.program_id(0)
    h, sequence = pid % H, pid // H
    c, z, z0 = locate_end(sequence, ends, T, N, C, PACKED)
    read, path = paths(log_p, c, z, z0, cap, h, H)
    l_R = tl.arange(0, READS)
    flow_R = tl.zeros([READS], tl.float32)
    for l in range(READS):
        decay = tl.sum(tl.where(read & (l_R == l), tl.exp2(path), 0.0), 0)
        if decay > 0:
            block = dblocks + ((sequence.to(tl.int64) * (cap + 1) + tl.minimum(l, cap)) * H + h) * SIZE
            state = slot_pointer(slots, nodes, c, z, z0, sequence, l, cap, h, H, SIZE, NODES)
            row = c - z + ((z >> l) << l) - 1
            is_node = ((z >> l) << l) <= z0
            for first in range(0, SIZE, E):
                x = first + tl.arange(0, E)
                pulled = decay * tl.load(block + x, mask=x < SIZE, other=0.0).to(tl.float32)
                held = tl.load(state + x, mask=x < SIZE, other=0.0).to(tl.float32)
                flow_R += tl.where(l_R == l, tl.sum(pulled * held, 0), 0.0)
                if NODES:
                    to_node = dnodes + ((sequence.to(tl.int64) * (cap + 1) + tl.minimum(l, cap)) * H + h) * SIZE + x
                    mask = x < tl.where(is_node, SIZE, 0)
                    tl.store(to_node, tl.load(to_node, mask=mask, other=0.0) + pulled, mask=mask)
                to_slot = dslots + (row * H + h) * SIZE + x
                mask = x < tl.where(is_node, 0, SIZE)
                pulled += tl.load(to_slot, mask=mask, other=0.0).to(tl.float32)
                tl.store(to_slot, pulled.to(dslots.dtype.element_ty), mask=mask)
    beyond = tl.cumsum(flow_R, 0, reverse=True) - flow_R
    end = (z >> l_R) << l_R
    to = dlog_p + (c - z + end - 1) * H + h
    mask = read & (end > z0)
    tl.store(to, tl.load(to, mask=mask, other=0.0) + beyond, mask=mask)

"""The Fenwick array of states, built and differentiated one storey (six levels, 64 entries) at a time.

Up:    Y_e = sum over the entries s of e's block of exp(log decay from s to e) X_s, a product with one 64 x 64 matrix W.
Down:  dX = W^T dY, and the gradient of every log decay.

An entry of storey s is a chunk e with e + 1 a multiple of 64**s; it stands for the 64**s chunks that end there. Entry
number j (from 1) of a run covers its last lowbit(j) entries; from the cap on, all entries since the run's start.
"""

# H heads, E numbers of a state in one tile, S storeys
import triton
import triton.language as tl

from loglinear.kernels.triton.tiles import RUN, SIZES, STOREY, dot_float32, exponent, head_program, locate_run


@triton.jit
def run_rows(run, table, N, storey, PACKED: tl.constexpr):
    """The run's entries: chunk rows, which exist, and for continued sequences first chunk and sequence number."""
    origin, count, number, z0, sequence = locate_run(run, table, N, storey, PACKED)
    z = ((number * RUN + tl.arange(0, RUN) + 1) << (STOREY * storey)) - 1
    return origin + z, z, (z < count) & (z >= z0), z0, sequence


@triton.jit
def node_entries(z, z0, sequence, cap, h, H):
    """Which entries before a continued sequence's first chunk are the ends of nodes, and the nodes' rows."""
    m = tl.minimum(exponent((z + 1) & -(z + 1)), cap)
    return (z < z0) & (((z0 >> m) << m) == z + 1), (sequence.to(tl.int64) * (cap + 1) + m) * H + h


@triton.jit
def covers(entry, other, cap, storey):
    """Does the slot of `entry` hold the part of `other`? Both number the entries of a run from 1."""
    rel = tl.maximum(cap - STOREY * storey, 0)
    low = entry & -entry
    size = tl.where(exponent(low) < rel, low, entry)
    return (other <= entry) & (other > entry - size)


@triton.jit
def log_decays(log_total):
    """[e, s] = sum of log_total over s < u <= e, through float64: a difference of sums that keeps its digits."""
    total = tl.cumsum(log_total.to(tl.float64), 0)
    return (total[:, None] - total[None, :]).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def up_sweep_kernel(
    slots, nodes, totals, next_totals, log_p, table,
    N, H, cap, storey,
    SIZE: tl.constexpr, E: tl.constexpr, STEPS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One run, one head, STEPS tiles of the states. Slots in place; totals -> log_p (and next_totals at run ends)."""
    PARTS: tl.constexpr = (SIZE + E * STEPS - 1) // (E * STEPS)
    part, h, run = head_program(PARTS, H)
    rows, z, exists, z0, sequence = run_rows(run, table, N, storey, PACKED)
    j = tl.arange(0, RUN) + 1
    log_total = tl.load(totals + rows * H + h, mask=exists, other=0.0)
    inside = covers(j[:, None], j[None, :], cap, storey)
    weights = tl.where(inside, tl.exp2(log_decays(log_total)), 0.0)
    if part == 0:
        block = tl.sum(tl.where(inside, log_total[None, :], 0.0), 1)
        tl.store(log_p + rows * H + h, block, mask=exists)
        run_total = tl.sum(log_total, 0)
        tl.store(next_totals + rows * H + h, tl.zeros_like(block) + run_total, mask=exists & (j == RUN))
    unchanged = tl.sum(inside.to(tl.int32), 1) == 1
    if NODES:
        is_node, node_rows = node_entries(z, z0, sequence, cap, h, H)
    for step in range(STEPS):
        x = (part * STEPS + step) * E + tl.arange(0, E)
        pointers = slots + (rows * H + h)[:, None] * SIZE + x[None, :]
        mask = exists[:, None] & (x < SIZE)[None, :]
        own = tl.load(pointers, mask=mask, other=0.0)
        if NODES:
            from_nodes = nodes + node_rows[:, None] * SIZE + x[None, :]
            own += tl.load(from_nodes, mask=is_node[:, None] & (x < SIZE)[None, :], other=0.0).to(DOT)
        block = dot_float32(weights, own, DOT, PRECISION)
        tl.store(pointers, block.to(slots.dtype.element_ty), mask=mask & (unchanged == 0)[:, None])


@triton.jit(do_not_specialize=SIZES)
def down_sweep_kernel(
    slots, dslots, nodes, dnodes, totals, dlog_p, dtotals, table,
    N, H, cap, storey, is_top, plane,
    SIZE: tl.constexpr, E: tl.constexpr, STEPS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """The adjoint, in place: dslots comes in as dY, leaves as dX. dtotals [part, chunk, H] gets, at the storey's
    entries, this part's share of the gradient of the entry's total."""
    PARTS: tl.constexpr = (SIZE + E * STEPS - 1) // (E * STEPS)
    part, h, run = head_program(PARTS, H)
    rows, z, exists, z0, sequence = run_rows(run, table, N, storey, PACKED)
    j = tl.arange(0, RUN) + 1
    log_total = tl.load(totals + rows * H + h, mask=exists, other=0.0)
    inside = covers(j[None, :], j[:, None], cap, storey)  # [s, e]
    beyond = inside & (j[:, None] != j[None, :])
    weights = tl.where(beyond, tl.exp2(-log_decays(log_total)), 0.0)
    flow = tl.zeros([RUN], tl.float32)
    if NODES:
        is_node, node_rows = node_entries(z, z0, sequence, cap, h, H)
    for step in range(STEPS):
        x = (part * STEPS + step) * E + tl.arange(0, E)
        offsets = (rows * H + h)[:, None] * SIZE + x[None, :]
        mask = exists[:, None] & (x < SIZE)[None, :]
        dblock = tl.load(dslots + offsets, mask=mask, other=0.0)
        block = tl.load(slots + offsets, mask=mask, other=0.0)
        through = dot_float32(weights, dblock, DOT, PRECISION)
        flow += tl.sum(through * block.to(tl.float32), 1)
        if NODES:
            offsets_n = node_rows[:, None] * SIZE + x[None, :]
            mask_n = is_node[:, None] & (x < SIZE)[None, :]
            flow += tl.sum(through * tl.load(nodes + offsets_n, mask=mask_n, other=0.0).to(tl.float32), 1)
            to_node = through + tl.load(dnodes + offsets_n, mask=mask_n, other=0.0)
            tl.store(dnodes + offsets_n, to_node, mask=mask_n)
        tl.store(dslots + offsets, (dblock.to(tl.float32) + through).to(dslots.dtype.element_ty), mask=mask)
    # What leaves entry j goes to its parent, and crosses the entries in between: every one after j up to the parent.
    rel = tl.maximum(cap - STOREY * storey, 0)
    low = j & -j
    parent = j + tl.where(exponent(low) < rel, low, 1 << tl.minimum(rel, STOREY))
    crossed = (j[None, :] > j[:, None]) & (j[None, :] <= parent[:, None])  # [from, crossed]
    dtotal = tl.sum(tl.where(crossed, flow[:, None], 0.0), 0)
    if part == 0:
        # The last entry of a run got its log P one storey higher, where there is one.
        dblock_log = tl.load(dlog_p + rows * H + h, mask=exists & (j < is_top + RUN), other=0.0)
        dtotal += tl.sum(tl.where(inside, dblock_log[None, :], 0.0), 1)
    tl.store(dtotals + plane * part + rows * H + h, dtotal, mask=exists)

"""Build the Fenwick array of block states in place, and its adjoint.

    S_block = P_right S_left + S_right          log P_block = log P_right + log P_left

Where the last column holds blocks of the largest size and all older ones, a scan in log2 many steps makes prefixes.
"""

# H heads of a slab, slots as in `Schedule`, K key, V value, D decays
from __future__ import annotations

from torch import Tensor

from loglinear.kernels.torch.gate import of_gate
from loglinear.kernels.torch.schedule import Merge, Scan, Schedule
from loglinear.kernels.torch.workspace import product, take


def merge(states: Tensor, log_p: Tensor, step: Merge) -> None:
    gate = log_p.index_select(1, step.right).exp_()[..., None]
    states.index_add_(1, step.right, take(states, step.left).mul_(gate))


def up_sweep(states: Tensor, log_p: Tensor, schedule: Schedule) -> list[Tensor]:
    """states [H, slots, K, V] and log_p [H, slots, D] in place; returns each merge's right log P for the backward."""
    rights = []
    for step in schedule.merges:
        rights.append(log_p.index_select(1, step.right))
        merge(states, log_p, step)
        log_p.index_add_(1, step.right, log_p.index_select(1, step.left))
    if schedule.scan is not None:
        scan = schedule.scan
        prefixes = linear_scan(take(states, scan.entries), log_p.index_select(1, scan.entries), scan)
        states.index_copy_(1, scan.prefixes, prefixes)
    return rights


def linear_scan(states: Tensor, log_p: Tensor, scan: Scan, mirrored: bool = False) -> Tensor:
    """prefix_y = P_y prefix_{y-1} + S_y for every y of every run, in place on both (or from right to left)."""
    ups, downs = (scan.mirrored_ups, scan.mirrored_downs) if mirrored else (scan.ups, scan.downs)
    for step in ups:
        merge(states, log_p, step)
        log_p.index_add_(1, step.right, log_p.index_select(1, step.left))
    for step in downs:
        merge(states, log_p, step)
    return states


def up_sweep_backward(
    states: Tensor, log_p: Tensor, rights: list[Tensor], dstates: Tensor, dlog_p: Tensor, schedule: Schedule
) -> None:
    """From the gradients of the slots to those of the chunks' own (S, log P), in place on dstates and dlog_p."""
    if schedule.scan is not None:
        _scan_backward(states, log_p, dstates, dlog_p, schedule.scan)
    for step, right in zip(reversed(schedule.merges), reversed(rights), strict=True):
        dlog_p.index_add_(1, step.left, dlog_p.index_select(1, step.right))
        passed = take(dstates, step.right).mul_(right.exp()[..., None])
        flow = product(passed, take(states, step.left)).sum(-1)
        dlog_p.index_add_(1, step.right, of_gate(flow, dlog_p.shape[-1]))
        dstates.index_add_(1, step.left, passed)


def _scan_backward(states: Tensor, log_p: Tensor, dstates: Tensor, dlog_p: Tensor, scan: Scan) -> None:
    """D_y = d_y + P_{y+1} D_{y+1};  dS_y = D_y;  dP_y = <D_y, prefix_{y-1}>."""
    block_log_p = log_p.index_select(1, scan.entries)
    # P moves to the entry on its left; a run's last entry is the first of the mirrored scan and needs none
    total = linear_scan(take(dstates, scan.prefixes), block_log_p.roll(-1, 1), scan, mirrored=True)
    dstates.index_fill_(1, scan.prefixes, 0.0)  # they may be the entries themselves
    dstates.index_add_(1, scan.entries, total)
    later = scan.successor
    earlier = scan.prefixes.index_select(0, later - 1)
    flow = product(take(total, later), take(states, earlier)).sum(-1)
    dlog = of_gate(flow, dlog_p.shape[-1]).mul_(block_log_p.index_select(1, later).exp())
    dlog_p.index_add_(1, scan.entries.index_select(0, later), dlog)

"""Build the Fenwick array of augmented states Z = [P | S] in place, and its adjoint.

    S_block = P_right S_left + S_right          P_block = P_right P_left

Where the last column holds blocks of the largest size and all older ones, a scan in log2 many steps makes prefixes.
"""

# H heads of a slab, slots as in `Schedule`, K key, V value
from __future__ import annotations

import torch
from torch import Tensor

from loglinear.kernels.torch.schedule import Merge, Scan, Schedule
from loglinear.kernels.torch.workspace import matmul, take


def merge(slots: Tensor, step: Merge) -> Tensor:
    """Joins pairs of blocks in place; returns the right blocks' transitions [H, m, K, K] as they were."""
    K = slots.shape[2]
    right = take(slots, step.right)
    transition = right[..., :K].clone()
    right[..., :K] = 0
    slots.index_copy_(1, step.right, right.add_(matmul(transition, take(slots, step.left))))
    return transition


def up_sweep(slots: Tensor, schedule: Schedule) -> list[Tensor]:
    """slots [H, slots, K, K + V] in place; returns each merge's right transitions for the backward."""
    rights = [merge(slots, step) for step in schedule.merges]
    if schedule.scan is not None:
        K, scan = slots.shape[2], schedule.scan
        prefixes = linear_scan(take(slots, scan.entries), scan)
        slots[:, scan.prefixes, :, K:] = prefixes[..., K:]  # the blocks' transitions stay: the backward needs them
    return rights


def linear_scan(slots: Tensor, scan: Scan, mirrored: bool = False) -> Tensor:
    """prefix_y = P_y prefix_{y-1} + S_y for every y of every run, in place (or from right to left)."""
    ups, downs = (scan.mirrored_ups, scan.mirrored_downs) if mirrored else (scan.ups, scan.downs)
    for step in ups + downs:
        merge(slots, step)
    return slots


def up_sweep_backward(slots: Tensor, rights: list[Tensor], dslots: Tensor, schedule: Schedule) -> None:
    """From the gradients of the slots to those of the chunks' own [P | S], in place on dslots."""
    if schedule.scan is not None:
        _scan_backward(slots, dslots, schedule.scan)
    K = slots.shape[2]
    for step, transition in zip(reversed(schedule.merges), reversed(rights), strict=True):
        dslot = take(dslots, step.right)
        dslots.index_add_(1, step.left, matmul(transition.mT, dslot))
        # of the right block, S enters as it is and P through the product with all of Z_left
        dslot[..., :K] = matmul(dslot, take(slots, step.left).mT)
        dslots.index_copy_(1, step.right, dslot)


def _scan_backward(slots: Tensor, dslots: Tensor, scan: Scan) -> None:
    """D_y = d_y + P_{y+1}^T D_{y+1};  dS_y = D_y;  dP_y = D_y prefix_{y-1}^T."""
    K = slots.shape[2]
    transitions = slots[..., :K].index_select(1, scan.entries)
    # P moves to the entry on its left; a run's last entry is the first of the mirrored scan and needs none
    mirrored = torch.cat([transitions.roll(-1, 1).mT, dslots[..., K:].index_select(1, scan.prefixes)], -1)
    total = linear_scan(mirrored, scan, mirrored=True)[..., K:]
    dslots[:, scan.prefixes, :, K:] = 0  # they may be the entries themselves
    dslots[:, scan.entries, :, K:] += total
    later = scan.successor
    earlier = scan.prefixes.index_select(0, later - 1)
    dslots[:, scan.entries.index_select(0, later), :, :K] += (
        total.index_select(1, later) @ slots[..., K:].index_select(1, earlier).mT
    )

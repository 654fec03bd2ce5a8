"""Sizes of the delta rule's tree that the launches and the kernels share."""

STOREY = 4  # levels of one storey: runs of 16 chunks

"""Sizes of the delta rule's tree that the launches and the kernels share."""

STOREY = 3  # levels of one storey: runs of 8 chunks

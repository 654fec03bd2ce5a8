"""The fast paths. kernels.torch runs everywhere."""

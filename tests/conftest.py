"""Every test starts from the same seed and one thread: the suite runs in parallel processes."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _reproducible():
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)

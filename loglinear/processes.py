"""This process among those that train together: torchrun and accelerate launch set these variables."""

import os


def is_main_process() -> bool:
    """Return True for the one process that writes files and speaks."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))

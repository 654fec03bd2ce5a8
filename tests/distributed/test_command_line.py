"""`loglinear train` in two processes: one of them speaks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.distributed.steps import RANKS
from tests.training.tiny import write_text

ROOT = Path(__file__).parents[2]
TIMEOUT = 150
OPTIONS = [
    "--seq-len",
    "32",
    "--batch-tokens",
    "128",
    "--micro-batch-tokens",
    "64",
    "--steps",
    "4",
    "--eval-every",
    "2",
]


def _train(*arguments: str) -> list[tuple[int, str]]:
    """Exit code and standard error of every process."""
    with socket.create_server(("localhost", 0)) as listener:
        port = listener.getsockname()[1]
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "loglinear.cli", "train", *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        texts = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


def test_one_of_two_processes_says_how_it_ended(tmp_path):
    text, out = write_text(tmp_path / "text"), tmp_path / "run"
    begin = ["--recipe", "demo", "--data", str(text), "--out", str(out), *OPTIONS]
    stopped = _train(*begin, "--minutes", "1e-9")
    ended = _train("--resume", "--out", str(out))
    for said, code, message in ((stopped, 130, "stopped at step 1 of 4"), (ended, 0, "trained demo for 4 steps")):
        assert [ended_with for ended_with, _ in said] == [code] * RANKS, said
        assert said[0][1].count(message) == 1 and not said[1][1]
        # torch would look for unused parameters in vain, and warn of the cost
        assert "find_unused_parameters" not in said[0][1]

"""A killed process ends the others with one line, and the run resumes from a whole checkpoint, exactly."""

import os
import subprocess
import sys
import time
from pathlib import Path

from loglinear.runs.checkpoints import checkpoints, defect
from loglinear.runs.folder import STAGING
from tests.training.tiny import assert_same_run, write_text

ROOT = Path(__file__).parents[2]
TIMEOUT = 150
ENDED_WITHIN = 60  # seconds after the death of one process
OPTIONS = "--seq-len 32 --batch-tokens 128 --micro-batch-tokens 64 --steps 10 --eval-every 5 --save-every 2"
TORCHRUN = "torch.distributed.run --standalone --nproc-per-node 2"
ACCELERATE = "accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes 2 --mixed_precision no"
ACCELERATE += " --dynamo_backend no --main_process_port 0"


def launch(launcher: str, *arguments: object, **environment: str) -> tuple[int, str]:
    """Run `loglinear train` in two processes; return the launcher's exit code and everything that was written."""
    command = [sys.executable, "-m", *launcher.split(), "-m", "tests.distributed.dying", "train", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, cwd=ROOT, env=environment, **streams) as process:
        try:
            said = process.communicate(timeout=TIMEOUT)[0]
        except subprocess.TimeoutExpired:
            process.terminate()  # so that the launcher ends its processes
            raise
    return process.returncode, said


def kill(launcher: str, die: str, died: Path, out: Path, *arguments: object) -> None:
    """Run until one process dies; the other one must say so in one line, and soon."""
    code, said = launch(launcher, *arguments, "--out", out, DIE=die, DIED=str(died))
    assert code != 0 and died.exists(), said
    assert time.time() - float(died.read_text()) < ENDED_WITHIN
    died.unlink()
    survivor = 1 - int(die[0])
    line = f"error: process {survivor} of 2 has lost another one ("
    assert said.count(line) == 1, said
    assert f"start all of them again with --resume --out {out}" in said
    assert f"[rank{survivor}]: Traceback" not in said and "(most recent call last)" not in said.partition(line)[0], said
    assert all(defect(path, resumable=True) is None for path in checkpoints(out))


def test_a_run_with_killed_processes_is_the_run_without(tmp_path):
    begin = ["--recipe", "demo", "--data", write_text(tmp_path / "text"), *OPTIONS.split()]
    out, died = tmp_path / "killed", tmp_path / "died"
    kill(TORCHRUN, "1 save 1", died, out, *begin)
    assert checkpoints(out) == []  # the first one was not whole, so the run starts again
    kill(ACCELERATE, "0 step 5", died, out, "--resume")
    kill(TORCHRUN, "0 save 2", died, out, "--resume")
    assert checkpoints(out)[-1].name == "checkpoint-4" and list((out / STAGING).iterdir())  # half of checkpoint-6
    kill(TORCHRUN, "1 step 4", died, out, "--resume")
    assert checkpoints(out)[-1].name == "checkpoint-6" and not (out / STAGING).exists()
    assert launch(TORCHRUN, "--resume", "--out", out)[0] == 0
    assert launch(TORCHRUN, *begin, "--out", tmp_path / "whole")[0] == 0
    assert_same_run(out, tmp_path / "whole")

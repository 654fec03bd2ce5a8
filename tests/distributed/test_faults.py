"""A killed process ends the others with one line, and the run resumes from a whole checkpoint, exactly."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loglinear.runs.checkpoints import checkpoints, defect, is_sharded
from loglinear.runs.folder import STAGING
from tests.training.tiny import assert_same_run, curve, write_text

ROOT = Path(__file__).parents[2]
TIMEOUT = 150
ENDED_WITHIN = 60  # seconds after the death of one process
OPTIONS = "--seq-len 32 --batch-tokens 128 --micro-batch-tokens 64 --steps 6 --eval-every 3 --save-every 2"
TORCHRUN = "torch.distributed.run --standalone --nproc-per-node 2"
FSDP2 = (
    f"accelerate.commands.launch --main_process_port 0 --config_file {ROOT / 'configs' / 'accelerate' / 'fsdp2.yaml'}"
)


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
    """Replicas are equal bit for bit. Sharded parameters (FSDP2) have other roundings."""
    begin = ["--recipe", "demo", "--data", write_text(tmp_path / "text"), *OPTIONS.split()]
    whole, out, shards, died = (tmp_path / name for name in ("whole", "killed", "shards", "died"))
    assert launch(TORCHRUN, *begin, "--out", whole)[0] == 0
    kill(TORCHRUN, "1 step 3", died, out, *begin)
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2"]
    kill(TORCHRUN, "0 save 4", died, out, "--resume")
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2"] and (out / STAGING / "checkpoint-4").exists()
    assert launch(TORCHRUN, "--resume", "--out", out)[0] == 0
    assert not (out / STAGING).exists()
    assert_same_run(out, whole)

    kill(FSDP2, "1 save 4", died, shards, *begin)
    assert [path.name for path in checkpoints(shards)] == ["checkpoint-2"] and is_sharded(shards / "checkpoint-2")
    assert launch(FSDP2, "--resume", "--out", shards)[0] == 0
    losses = [[(line["step"], line["split"], line["loss"]) for line in curve(folder)] for folder in (shards, whole)]
    assert [line[:2] for line in losses[0]] == [line[:2] for line in losses[1]]
    assert [line[2] for line in losses[0]] == pytest.approx([line[2] for line in losses[1]], rel=1e-5)


def test_a_process_that_waits_in_vain_says_so_before_the_launcher_kills_it(tmp_path):
    """A stopped process is like one that NCCL does not miss: the other one waits, and no handler of it runs."""
    with socket.create_server(("localhost", 0)) as listener:
        port = listener.getsockname()[1]
    begin = ["--recipe", "demo", "--data", write_text(tmp_path / "text"), "--out", tmp_path / "run", *OPTIONS.split()]
    command = [sys.executable, "-m", "tests.distributed.dying", "train", *map(str, begin)]
    died = tmp_path / "died"
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    common |= {"DIE": "1 hang 3", "DIED": str(died), "GRACE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        while not died.exists():
            assert all(process.poll() is None for process in processes)
            time.sleep(0.1)
        time.sleep(1)  # the other one needs a moment to wait
        processes[0].terminate()
        said = processes[0].communicate(timeout=TIMEOUT)[0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == 143 and "Traceback" not in said
    line = "error: process 0 of 2 still waits for another one 2 seconds after SIGTERM: start all of them again"
    assert said.count(line) == 1, said

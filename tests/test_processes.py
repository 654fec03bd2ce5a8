"""Worker processes leave the signals of a terminal to their parent, and end with it."""

import subprocess
import sys
from pathlib import Path

import pytest

PARENT = """
import multiprocessing, os, signal, sys, time
from loglinear.processes import follow_parent

def work(numbers):
    follow_parent()
    for name in sys.argv[1:]:
        os.kill(os.getpid(), getattr(signal, name))
    numbers.send(os.getpid())
    time.sleep(90)

if __name__ == "__main__":
    numbers, theirs = multiprocessing.Pipe(duplex=False)
    worker = multiprocessing.get_context("spawn").Process(target=work, args=[theirs])
    worker.start()
    theirs.close()
    print(numbers.recv(), flush=True)
    os._exit(3)  # as after a signal, without the end of the worker
"""


def started(script: Path, *signals: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, script, *signals], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


@pytest.mark.parametrize("signals", [(), ("SIGINT", "SIGHUP")], ids=["none", "terminal"])
def test_a_worker_ends_with_its_parent_and_not_before(tmp_path, signals):
    """The output of both ends only when both have ended."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    process = started(script, *signals)
    out, _ = process.communicate(timeout=45)
    assert process.returncode == 3 and int(out) > 0


def test_a_broken_pool_can_end_a_worker(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    process = started(script, "SIGTERM")
    assert process.communicate(timeout=45)[0] == "" and process.returncode == 1  # EOFError: the worker is gone

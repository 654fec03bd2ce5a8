"""Reports of processes in which Triton compiles for a device that is not there."""

import json
import os
import subprocess
import sys


def report_of(module):
    """Return the JSON that `python -m tests.kernels.MODULE` prints. Triton compiles there, and interprets nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"tests.kernels.{module}"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)

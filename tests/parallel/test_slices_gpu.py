"""Slices of sequences on two GPUs have the errors of one GPU, in bfloat16 with the Triton kernels."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.ops.operators import OPERATORS
from tests.parallel.gpu_worker import CASES

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = tmp_path_factory.mktemp("slices")
    command = ["torchrun", "--nproc-per-node", "2", "-m", "tests.parallel.gpu_worker", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "errors.json").read_text())


@pytest.mark.parametrize("operator", [operator.name for operator in OPERATORS])
@pytest.mark.parametrize("case", CASES)
def test_slices_add_less_error_than_one_gpu_has(found, case, operator):
    """As on CPU processes, where the largest ratio of bfloat16 errors is 1.08."""
    for part, numbers in found[f"{operator} {case}"].items():
        assert numbers["slices"] < 1.3 * numbers["one"], (part, numbers)

"""Two processes train the new parameters of an upgraded model as one process does with all of the data."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import loglinear
from tests.distributed.upgraded_worker import DTYPES, WAYS, steps
from tests.upgrades.tiny import original, upgraded

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("family", ["qwen3_5", "mamba2"])
def test_steps_are_those_of_one_process(family, tmp_path):
    """With values in float32 beside 16-bit weights too, of which FSDP2 makes units of their own."""
    upgraded(original(family, torch.float32), routing="gram").save_pretrained(tmp_path)
    common = dict(WORLD_SIZE="2", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), MASTER_ADDR="localhost", MASTER_PORT="0")
    command, logs = [sys.executable, "-m", "tests.distributed.upgraded_worker", str(tmp_path)], []
    processes = []
    for rank in ("0", "1"):
        logs.append(tmp_path / f"{rank}.log")
        with logs[-1].open("w") as log:
            environment = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}
            processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log))
    try:
        codes = [process.wait(150) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    found = torch.load(tmp_path / "found.pt")
    assert found.keys() == {(way, dtype) for way in WAYS for dtype in DTYPES}
    for (way, dtype), (losses, weights) in found.items():
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        is_exact = dtype == torch.float32
        assert losses == pytest.approx(steps(model, slice(0, 4)), rel=1e-5 if is_exact else 2e-2), (way, dtype)
        new = loglinear.new_parameters(model)
        assert {name: w.dtype for name, w in weights.items()} == {name: p.dtype for name, p in new.items()}
        theirs = original(family, torch.float32).to(dtype)
        loglinear.load_upgrade(theirs, tmp_path / f"{way}-{dtype}.safetensors")
        assert all(torch.equal(p, weights[name]) for name, p in loglinear.new_parameters(theirs).items())
        for name, parameter in new.items():
            error = (weights[name] - parameter).norm() / parameter.norm()  # all start at zero
            assert not is_exact or error < 1e-3, (way, name)

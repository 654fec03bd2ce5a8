"""The benchmark of slices runs on two processes, and counts the bytes that the guide promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

from loglinear.recipes import get_recipe

ROOT = Path(__file__).parents[2]


def test_two_processes_time_their_slices(tmp_path):
    out = tmp_path / "slices.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "benchmarks.slices", "--recipe", "demo", "--tokens", "64", "--out", str(out)]
    command += ["--kind", "mamba2, log-linear", "--kind", "gated_delta_net, log-linear"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["kind"]: row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 2 and "Training steps on slices" in done.stdout
    for kind, row in rows.items():
        variant = kind.split(",")[0]
        config = type(get_recipe("demo").model_config())(**{**get_recipe("demo").model, "variant": variant})
        H, G, K, V = config.heads.num_heads, config.heads.num_groups, config.heads.key_dim, config.heads.head_dim
        states = H * (K * V + (1 if variant == "mamba2" else K * K))
        inputs = (config.conv_kernel - 1) * (2 * G * K + H * V)
        assert row["slices"]["sent_bytes_per_layer"] == 4 * (states + inputs)
        assert row["alone"]["sent_bytes_per_layer"] == 0
        assert row["ranks"] == 2 and row["efficiency"] > 0

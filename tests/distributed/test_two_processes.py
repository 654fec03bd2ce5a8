"""Two processes, sharded or replicated, take the steps that one process takes with all of the data."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from tests.distributed.steps import DTYPES, RANKS, batches, mean_loss, optimizer_of

ROOT = Path(__file__).parents[2]
MODELS = {
    "mamba2": {},
    "gated_delta_net": {"variant": "gated_delta_net", "lambda_form": "unit"},
    "hybrid": {"variant": "gated_delta_net", "layer_types": ["linear_attention", "full_attention"]},
}
TIMEOUT = 150


def _make(name: str) -> LogLinearForCausalLM:
    torch.manual_seed(0)
    config = LogLinearConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, intermediate_size=24, num_heads=4, key_dim=6, head_dim=5,
        num_levels=5, chunk_size=4, num_attention_heads=2, num_key_value_heads=1, attention_head_dim=8,
        initializer_range=0.2, **{"lambda_form": "softplus", **MODELS[name]},
    )  # fmt: skip
    return LogLinearForCausalLM(config)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What two processes found, by model, way and dtype: names that decay, losses, weights."""
    folder = tmp_path_factory.mktemp("processes")
    for name in MODELS:
        _make(name).save_pretrained(folder / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = dict(WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "tests.distributed.worker", str(folder)]
    processes = []
    for rank in range(RANKS):
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)}
        with (folder / f"{rank}.log").open("w") as log:
            processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log))
    try:
        codes = [process.wait(TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * RANKS, "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(RANKS))
    return torch.load(folder / "found.pt")


WAYS = [(way, dtype) for way in ("fully_shard", "transformers") for dtype in DTYPES] + [("ddp", torch.float32)]


@pytest.mark.parametrize(("way", "dtype"), WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_steps_are_those_of_one_process(found, tmp_path, name: str, way: str, dtype: torch.dtype) -> None:
    """Also where a rank has nothing but padding, or a single token."""
    decayed, losses, weights = found[name, way, dtype]
    _make(name).save_pretrained(tmp_path)
    alone = LogLinearForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    names = [other.removeprefix("module.") for other in decayed]
    assert names == Trainer.get_decay_parameter_names(None, alone)
    start = {key: value.clone() for key, value in alone.state_dict().items()}
    optimizer, expected = optimizer_of(alone), []
    for parts in zip(*(batches(rank) for rank in range(RANKS)), strict=True):
        loss = torch.stack([mean_loss(alone, *part) for part in parts]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    budget = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(losses, expected, rtol=budget, atol=budget)
    assert weights.keys() == start.keys()
    for key, value in alone.state_dict().items():
        assert weights[key].dtype == value.dtype, key
        error, change = (weights[key] - value).norm(), (value - start[key]).norm()
        assert error <= budget * change, key

"""Two processes, sharded or replicated, take the steps that one process takes with all of the data."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from loglinear.models import LogLinearForCausalLM
from tests.distributed.steps import RANKS, batches, mean_loss, optimizer_of
from tests.models.tiny_models import tiny_config

ROOT = Path(__file__).parents[2]
MODELS = {
    "mamba2": {},
    "gated_delta_net": {"variant": "gated_delta_net", "lambda_form": "unit"},
    "hybrid": {"variant": "gated_delta_net", "layer_types": ["linear_attention", "full_attention"]},
}
TIMEOUT = 150


def _make(name: str) -> LogLinearForCausalLM:
    torch.manual_seed(0)
    # One slice of the loss: gradients of several would be added up in another order, and steps this large magnify that.
    return LogLinearForCausalLM(tiny_config(loss_chunk_size=64, **MODELS[name]))


def _processes(folder: Path) -> dict:
    """The findings of two processes, by model, way and dtype: names that decay, losses, weights."""
    for name in MODELS:
        _make(name).save_pretrained(folder / name)
    common = dict(WORLD_SIZE=str(RANKS), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "tests.distributed.worker", str(folder)]
    processes = []
    for rank in range(RANKS):
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"{rank}.log").open("w") as log:
            processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log))
    try:
        codes = [process.wait(TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * RANKS, "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(RANKS))
    return torch.load(folder / "found.pt")


def _one_process(folder: Path, dtype: torch.dtype) -> tuple[list[str], list[float], dict, dict]:
    """The findings to expect, and the weights of the beginning."""
    model = LogLinearForCausalLM.from_pretrained(folder, dtype=dtype)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer, losses = optimizer_of(model), []
    for parts in zip(*(batches(rank) for rank in range(RANKS)), strict=True):
        loss = torch.stack([mean_loss(model, *part) for part in parts]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Trainer.get_decay_parameter_names(None, model), losses, model.state_dict(), start


def test_steps_are_those_of_one_process(tmp_path) -> None:
    """In every way to spread a model, in both dtypes, and where a rank has nothing but padding or a single token."""
    found = _processes(tmp_path)
    assert len(found) == len(MODELS) * 5
    for (name, way, dtype), (decayed, losses, weights) in found.items():
        case, budget = f"{name}, {way}, {dtype}", 1e-5 if dtype == torch.float32 else 2e-2
        expected_decayed, expected_losses, expected, start = _one_process(tmp_path / name, dtype)
        assert [parameter.removeprefix("module.") for parameter in decayed] == expected_decayed, case
        assert losses == pytest.approx(expected_losses, rel=budget), case
        assert weights.keys() == expected.keys(), case
        for key, value in expected.items():
            assert weights[key].dtype == value.dtype, (case, key)
            error, change = (weights[key] - value).norm(), (value - start[key]).norm()
            assert error <= budget * change and change > 0, (case, key)

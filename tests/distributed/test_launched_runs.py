"""`loglinear train` under torchrun and accelerate launch has the losses of one process, and resumes in any number."""

import os
import shlex
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from loglinear.recipes import TrainingRecipe, get_recipe
from loglinear.runs.checkpoints import defect, is_sharded
from loglinear.runs.loading import load_model
from loglinear.runs.metrics import read_metrics
from loglinear.training.train import train
from tests.training.tiny import tiny_recipe, write_text

ROOT = Path(__file__).parents[2]
TIMEOUT = 200
# A step is two rows of packed documents, and some documents cross the middle of a row, where slices are cut.
SIZES: dict[str, Any] = dict(seq_len=256, batch_tokens=1024, micro_batch_tokens=512, steps=4, eval_every=2)
OPTIONS = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SIZES.items())
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node {}"
ACCELERATE = "-m accelerate.commands.launch --main_process_port 0 --config_file {} --num_processes {}"
EXACT, ROUNDED = 1e-5, 1e-3  # relative, of losses; measured: 2e-7 in float32, 5e-5 in bfloat16
STOPPED = "--minutes 1e-9"  # after one step


def config(name: str) -> Path:
    return ROOT / "configs" / "accelerate" / f"{name}.yaml"


def launch(launcher: str, *lines: str) -> str:
    """Run command lines of loglinear under a launcher; return its standard error."""
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("localhost", 0))) for _ in lines]
        ports = ",".join(str(server.getsockname()[1]) for server in servers)
    command = [sys.executable, *launcher.split(), "-m", "tests.distributed.commands", ports, *lines]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            said = process.communicate(timeout=TIMEOUT)[0]
        except subprocess.TimeoutExpired:
            process.terminate()  # so that the launcher ends its processes
            said = process.communicate()[0]
    assert process.returncode == 0, said[-5000:]
    return said


def recipe(text: Path, **changes: Any) -> TrainingRecipe:
    return get_recipe("demo").override(data=(str(text),), **SIZES, **changes)


def losses(out: Path) -> dict[tuple[int, str], float]:
    """The losses of a run by step and split; a validation counts as one."""
    return {(line["step"], line["split"]): line["loss"] for line in read_metrics(out)}


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text")


def begin(text: Path, out: Path, more: str = "") -> str:
    return f"train --recipe demo --data {shlex.quote(str(text))} --out {shlex.quote(str(out))} {OPTIONS} {more}"


def test_fsdp2_has_the_losses_of_one_process_and_resumes_in_any_number(text, tmp_path):
    pieces, rounded, slices = (tmp_path / name for name in ("pieces", "rounded", "slices"))
    for out, dtype in ((tmp_path / "one", "float32"), (tmp_path / "one_rounded", "bfloat16")):
        train(recipe(text, dtype=dtype, checkpointing=True), out, progress=False)
    said = launch(
        ACCELERATE.format(config("fsdp2"), 2),
        begin(text, pieces, f"--dtype float32 --checkpointing {STOPPED}"),
        begin(text, rounded, "--dtype bfloat16"),
        begin(text, slices, "--dtype float32 --context-parallel 2"),
    )
    assert "stopped at step 1 of 4" in said and "Warning" not in said

    checkpoint = pieces / "checkpoint-1"
    assert is_sharded(checkpoint) and defect(checkpoint, resumable=True) is None
    for shards in ("pytorch_model_fsdp_0", "optimizer_0"):
        sizes = [path.stat().st_size for path in (checkpoint / shards).glob("*.distcp")]
        assert len(sizes) == 2 and max(sizes) < 1.2 * min(sizes)
    exported = load_model(checkpoint).state_dict()
    stored = {"model": {name: torch.full_like(tensor, torch.nan) for name, tensor in exported.items()}}
    dcp.load(stored, checkpoint_id=str(checkpoint / "pytorch_model_fsdp_0"), no_dist=True)
    assert all(torch.equal(stored["model"][name], tensor) for name, tensor in exported.items())

    whole = tmp_path / "whole"
    train(recipe(text), whole, minutes=1e-9, progress=False)
    resumed = [f"train --resume --out {shlex.quote(str(out))} {STOPPED}" for out in (pieces, whole)]
    said = launch(ACCELERATE.format(config("fsdp2"), 1), *resumed)
    assert "not sharded, and FSDP2 resumes from shards alone" in said and "Traceback" not in said
    assert is_sharded(pieces / "checkpoint-2")
    train(recipe(text, dtype="float32", checkpointing=True), pieces, resume=True, progress=False)
    assert not is_sharded(pieces / "checkpoint-4")

    damaged = pieces / "checkpoint-2"
    next((damaged / "optimizer_0").glob("*.distcp")).write_bytes(b"cut")
    assert defect(damaged) is None and "optimizer_0/__" in str(defect(damaged, resumable=True))

    exact, bfloat16 = losses(tmp_path / "one"), losses(tmp_path / "one_rounded")
    assert len(exact) == 6
    assert losses(pieces) == pytest.approx(exact, rel=EXACT)
    assert losses(slices) == pytest.approx(exact, rel=EXACT)
    assert losses(rounded) == pytest.approx(bfloat16, rel=ROUNDED)
    # Before any update both round the same numbers: FSDP2 must not round the residual stream or the loss.
    assert losses(rounded)[1, "train"] == pytest.approx(bfloat16[1, "train"], rel=EXACT) != exact[1, "train"]


def test_replicas_and_slices_have_the_losses_of_one_process(text, tmp_path):
    train(recipe(text), tmp_path / "one", progress=False)
    replicas, slices, both = (tmp_path / name for name in ("replicas", "slices", "both"))
    launch(ACCELERATE.format(config("ddp"), 2), begin(text, replicas), begin(text, slices, "--context-parallel 2"))
    launch(TORCHRUN.format(4), begin(text, both, "--context-parallel 2"))
    for out in (replicas, slices, both):
        assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=EXACT), out.name


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"context_parallel": 2}, "context_parallel must divide the number of processes, got 2 and 1"),
        ({"jitter": 100}, {"context_parallel": 2}, "leave jitter out"),
        ({}, {"context_parallel": 2, "equal_rows": True}, "leave equal_rows out"),
    ],
)
def test_a_run_that_cannot_be_cut_is_refused(text, tmp_path, monkeypatch, changes, options, message):
    if changes or "equal_rows" in options:
        monkeypatch.setattr("loglinear.training.sequences.world_size", lambda: 2)
    with pytest.raises(ValueError, match=message):
        train(replace(tiny_recipe(text), **changes), tmp_path / "run", progress=False, **options)
    assert not (tmp_path / "run").exists()


def test_configurations_of_accelerate_that_contradict_the_run_are_refused(text, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="mixed_precision: fp16, and this run computes in float32"):
        train(tiny_recipe(text, dtype="float32"), tmp_path / "run", progress=False)
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP needs processes"):
        train(tiny_recipe(text), tmp_path / "run", progress=False)

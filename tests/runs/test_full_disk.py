"""Writing fails: one line that names the file and the reason, nothing lost, and a folder that can be used again."""

import contextlib
import errno
import os
import re
import resource
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from loglinear.runs import files
from loglinear.runs.checkpoints import checkpoints, defect
from loglinear.runs.files import write_atomically
from loglinear.runs.folder import claim
from loglinear.training.train import train
from tests.cli.command_line import FAST, in_process
from tests.training.tiny import assert_same_run, tiny_recipe


@contextlib.contextmanager
def no_file_above(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_usable(out, data, whole):
    """Nothing of ours is in the way: the run begins anew where it had not begun, and goes on where it had."""
    assert not [path.name for path in out.glob(".*") if path.name != ".lock"]
    assert all(defect(checkpoint, resumable=True) is None for checkpoint in checkpoints(out))
    train(tiny_recipe(data), out, resume=(out / "run.json").exists(), progress=False)
    assert_same_run(out, whole)


@pytest.mark.parametrize(
    ("size", "file", "reason"),
    [
        (0, "run", "File too large"),
        (400, "run.json", "File too large"),
        (10_000, "checkpoint-2", "File too large"),  # the weights
        (80_000, "checkpoint-2", "a write failed"),  # the optimizer's state
    ],
)
def test_a_limit_of_file_size_is_one_line(tmp_path, data, whole, size, file, reason):
    out = tmp_path / "run"
    with no_file_above(size), pytest.raises((ValueError, OSError)) as error:
        train(tiny_recipe(data), out, progress=False)
    assert re.search(rf"{file} cannot be written: {reason}", str(error.value)), error.value
    assert_usable(out, data, whole)


def test_metrics_that_cannot_grow_are_one_line_and_the_checkpoints_stay(tmp_path, data, whole):
    size = (whole / "metrics.jsonl").read_bytes().index(b'"step": 6')
    out = tmp_path / "run"
    sizes = {path.stat().st_size for path in whole.rglob("*") if path.is_file()}
    append = files.writing

    @contextlib.contextmanager
    def limited(path):
        with append(path), no_file_above(size) if path.name == "metrics.jsonl" else contextlib.nullcontext():
            yield

    assert size < max(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loglinear.runs.metrics.writing", limited)
        with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: File too large"):
            train(tiny_recipe(data), out, progress=False)
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2", "checkpoint-4"]
    assert_usable(out, data, whole)


def test_on_the_command_line_it_is_code_2(capsys, tmp_path, data):
    arguments = ["--recipe", "demo", "--data", data, "--out", tmp_path / "run", *FAST]
    with no_file_above(100_000):
        code, out, errors = in_process(capsys, "train", *arguments)
    expected = f"error: {tmp_path / 'run' / 'checkpoint-2'} cannot be written: File too large"
    assert code == 2 and errors.splitlines()[-1] == expected
    assert "Traceback" not in errors and out == ""


FAILURES = {
    "No space left on device": [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    "a write failed": [
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
}


@pytest.mark.parametrize(("reason", "error"), [(reason, error) for reason in FAILURES for error in FAILURES[reason]])
@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_save_that_fails_in_any_way_is_one_line(tmp_path, data, whole, monkeypatch, reason, error, name):
    save = torch.save

    def full(value, path, *args, **kwargs):
        if str(path).endswith(f"checkpoint-4/{name}"):
            Path(path).write_bytes(b"half")
            raise error
        return save(value, path, *args, **kwargs)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=rf"checkpoint-4 cannot be written: {reason}"):
            train(tiny_recipe(data), out, progress=False)
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2"]
    assert_usable(out, data, whole)


def test_other_errors_while_saving_are_not_called_a_full_disk(tmp_path, data, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="CUDA error"):
        train(tiny_recipe(data), tmp_path / "run", progress=False)


@pytest.mark.parametrize("left", [".run.json.new", ".metrics.jsonl.new", ".saving"])
def test_what_a_kill_leaves_of_our_own_does_not_count_as_content(tmp_path, data, left):
    out = tmp_path / "run"
    out.mkdir()
    if left == ".saving":
        (out / left / "checkpoint-2").mkdir(parents=True)
    else:
        (out / left).write_text("half")
    assert train(tiny_recipe(data, steps=2), out, progress=False).step == 2


def test_a_failed_replacement_keeps_the_old_text(tmp_path):
    file = tmp_path / "text"
    write_atomically(file, "old")
    with no_file_above(2), pytest.raises(OSError, match=rf"{file} cannot be written: File too large"):
        write_atomically(file, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path):
    with no_file_above(0), pytest.raises(ValueError, match="cannot be written: File too large"), claim(tmp_path):
        pass
    with claim(tmp_path):
        pass

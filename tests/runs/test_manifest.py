"""Checkpoints are checked, byte for byte, before anything is read from them; damage is named or passed over."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch

from loglinear.runs.checkpoints import defect, last_checkpoint, resolve
from loglinear.runs.folder import run_recipe
from loglinear.runs.json_files import read_object
from loglinear.runs.loading import load_checkpoint, load_model
from loglinear.training.train import train
from tests.training.tiny import assert_same_run, tiny_recipe

OF_TRAINING = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin")


@pytest.fixture
def run(tmp_path, whole):
    return shutil.copytree(whole, tmp_path / "run")


def flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def zero_the_second_half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


DAMAGES = [flip, zero_the_second_half, halve, empty, Path.unlink]


def names(checkpoint):
    return sorted(path.name for path in checkpoint.iterdir())


def test_every_file_of_a_save_is_listed(whole):
    for checkpoint in whole.glob("checkpoint-*"):
        manifest = read_object(checkpoint / "manifest.json")
        assert sorted([*manifest["files"], "manifest.json"]) == names(checkpoint)
        assert list(manifest["run"]) == ["metrics.jsonl"]
        assert defect(checkpoint, resumable=True) is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_found_and_named(run, damage):
    checkpoint = run / "checkpoint-8"
    for name in names(checkpoint):
        before = (checkpoint / name).read_bytes()
        damage(checkpoint / name)
        for resumable in (True, False):
            problem = defect(checkpoint, resumable=resumable)
            if (name in OF_TRAINING and not resumable) or (name == "manifest.json" and damage is Path.unlink):
                assert problem is None, name
            else:
                assert problem is not None and name in problem
        (checkpoint / name).write_bytes(before)


def test_a_damaged_checkpoint_is_not_loaded_and_an_edit_says_so(run):
    checkpoint = run / "checkpoint-8"
    config = read_object(checkpoint / "config.json")
    (checkpoint / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    for load in (load_model, load_checkpoint, resolve):
        with pytest.raises(ValueError, match=r"checkpoint-8 is not whole: config\.json "):
            load(checkpoint)


def test_a_run_means_its_newest_whole_checkpoint_and_says_what_was_passed_over(run, caplog):
    flip(run / "checkpoint-8" / "model.safetensors")
    assert resolve(run).name == "checkpoint-6"
    assert f"{run / 'checkpoint-8'} is not whole: model.safetensors is damaged" in caplog.text
    assert "going back to checkpoint-6" in caplog.text
    for name in ("checkpoint-6", "checkpoint-4"):
        halve(run / name / "tokenizer_config.json")
    with pytest.raises(ValueError, match=r"checkpoint-8 is not whole: model\.safetensors .*; no other"):
        resolve(run)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "model.safetensors", "trainer_state.json"])
def test_resume_goes_back_to_the_newest_whole_checkpoint_and_says_so(run, data, whole, caplog, name):
    flip(run / "checkpoint-8" / name)
    train(tiny_recipe(data), run, resume=True, progress=False)
    assert f"checkpoint-8 is not whole: {name}" in caplog.text and "going back to checkpoint-6" in caplog.text
    assert_same_run(run, whole)


def test_resume_without_any_whole_checkpoint_is_refused(run, data):
    for checkpoint in run.glob("checkpoint-*"):
        flip(checkpoint / "optimizer.pt")
    with pytest.raises(ValueError, match=r"checkpoint-8 is not whole: optimizer\.pt is damaged.*; no other"):
        train(tiny_recipe(data), run, resume=True, progress=False)


@pytest.mark.parametrize("damage", DAMAGES)
def test_metrics_that_are_not_those_of_the_checkpoint_are_found(run, data, whole, caplog, damage):
    damage(run / "metrics.jsonl")
    if damage in (empty, Path.unlink):
        with pytest.raises(ValueError, match=r"checkpoint-8 is not whole: the run's metrics\.jsonl .*; no other"):
            train(tiny_recipe(data), run, resume=True, progress=False)
    else:
        train(tiny_recipe(data), run, resume=True, progress=False)
        assert "the run's metrics.jsonl" in caplog.text and "going back to checkpoint-4" in caplog.text
        assert_same_run(run, whole)


def test_damage_behind_the_checkpoint_is_cut_off_with_the_steps_that_are_trained_again(run, data, whole):
    shutil.rmtree(run / "checkpoint-8")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]) + '{"step": 1, "split": "tr\n\0\0\0')
    train(tiny_recipe(data), run, resume=True, progress=False)
    assert_same_run(run, whole)


def test_an_old_broken_checkpoint_does_not_count_among_those_that_are_kept(run, data, whole):
    for name in ("checkpoint-6", "checkpoint-8"):
        flip(run / name / "optimizer.pt")
    recipe = tiny_recipe(data, keep_checkpoints=1)
    description = read_object(run / "run.json")
    del description["sha256"]
    description["recipe"]["keep_checkpoints"] = 1
    (run / "run.json").write_text(json.dumps(description))
    result = train(recipe, run, resume=True, minutes=1e-9, progress=False)
    assert result.step == 5 and last_checkpoint(run) == run / "checkpoint-5"


# --- without a manifest ----------------------------------------------------------------------------------------------


def test_a_checkpoint_without_a_manifest_is_taken_and_a_note_says_so(run, data, whole, caplog):
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / "manifest.json").unlink()
    shutil.rmtree(run / "checkpoint-8")
    train(tiny_recipe(data), run, resume=True, progress=False)
    assert f"{run / 'checkpoint-6'} has no manifest.json, so its contents were not checked" in caplog.text
    assert_same_run(run, whole)
    caplog.clear()
    load_model(run / "checkpoint-6")
    assert "has no manifest.json" in caplog.text
    caplog.clear()
    load_checkpoint(run)
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["rng_state.pth", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
@pytest.mark.parametrize("damage", [halve, Path.unlink, lambda path: path.write_text("{}")])
def test_a_visible_defect_needs_no_manifest(run, name, damage):
    checkpoint = run / "checkpoint-8"
    (checkpoint / "manifest.json").unlink()
    assert defect(checkpoint, resumable=True) is None
    damage(checkpoint / name)
    assert defect(checkpoint, resumable=True).startswith(name)
    assert damage is not Path.unlink or defect(checkpoint) is None


def test_training_states_of_another_type_need_no_manifest(run):
    checkpoint = run / "checkpoint-8"
    (checkpoint / "manifest.json").unlink()
    file = checkpoint / "trainer_state.json"
    state = read_object(file)
    for name, value in state.items():
        wrong = 3 if isinstance(value, (str, list, dict)) else ["3"]
        file.write_text(json.dumps({**state, name: wrong}))
        assert name in defect(checkpoint, resumable=True)
    file.write_text(json.dumps({**state, "surplus": 1}))
    assert "unknown field 'surplus'" in defect(checkpoint, resumable=True)


@pytest.mark.parametrize(("name", "what"), [("optimizer.pt", "optimizer.pt or"), ("rng_state.pth", "random numbers")])
def test_states_that_cannot_be_loaded_are_one_line(run, data, name, what):
    shutil.rmtree(run / "checkpoint-8")
    (run / "checkpoint-6" / "manifest.json").unlink()
    torch.save({"of": "something else"}, run / "checkpoint-6" / name)
    with pytest.raises(ValueError, match=rf"checkpoint-6 cannot be resumed: its .*{what}"):
        train(tiny_recipe(data), run, resume=True, progress=False)


@pytest.mark.parametrize("text", ["{}", '{"files": 3, "run": {}}', '{"files": {"a": {"bytes": "1"}}, "run": {}}', "[]"])
def test_a_manifest_that_is_none_is_one_line(run, text):
    (run / "checkpoint-8" / "manifest.json").write_text(text)
    assert "manifest.json" in defect(run / "checkpoint-8")


# --- run.json --------------------------------------------------------------------------------------------------------


def test_a_changed_run_json_is_refused_unless_its_checksum_is_removed(run):
    description = read_object(run / "run.json")
    description["recipe"]["learning_rate"] = 0.5
    (run / "run.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"run\.json is damaged: .*to keep an edit, remove its 'sha256'"):
        run_recipe(run)
    del description["sha256"]
    (run / "run.json").write_text(json.dumps(description))
    assert run_recipe(run).learning_rate == 0.5


# --- how they are written --------------------------------------------------------------------------------------------


def test_everything_is_on_the_disk_before_the_checkpoint_has_its_name(tmp_path, data, monkeypatch):
    fsync, rename, events = os.fsync, Path.rename, []
    place = lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append(place(descriptor)), fsync(descriptor)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (events.append(f"rename {to}"), rename(path, to)))
    out = tmp_path / "run"
    train(tiny_recipe(data, steps=2), out, progress=False)
    renamed = events.index(f"rename {out / 'checkpoint-2'}")
    staged = out / ".saving" / "checkpoint-2"
    files = [str(staged / name) for name in names(out / "checkpoint-2") if name != "manifest.json"]
    needed = [*files, str(staged / ".manifest.json.new"), str(staged), str(out / "metrics.jsonl")]
    assert set(needed) <= set(events[:renamed])
    assert str(out) in events[renamed:]


def test_modes_follow_the_umask(tmp_path, data):
    before = os.umask(0o022)
    try:
        for mask, mode in ((0o022, 0o644), (0o007, 0o660)):
            os.umask(mask)
            out = tmp_path / f"{mask}"
            train(tiny_recipe(data, steps=2), out, progress=False)
            found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (out / "checkpoint-2").iterdir()}
            assert set(found.values()) == {mode}, found
    finally:
        os.umask(before)


def test_a_file_that_may_not_be_read_is_not_called_truncated(run, monkeypatch):
    def forbidden(path, *args, **kwargs):
        if Path(path).name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, *args, **kwargs)

    open_file = Path.open
    monkeypatch.setattr(Path, "open", forbidden)
    assert defect(run / "checkpoint-8") == "model.safetensors cannot be read: Permission denied"

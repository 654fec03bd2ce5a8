"""Runs: exact resume after any kind of end, whole checkpoints, and what is written beside them."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from loglinear.data.corpus import load_corpus
from loglinear.data.packing import IGNORED, PackedRows
from loglinear.models import ByteTokenizer, LogLinearConfig, LogLinearForCausalLM
from loglinear.runs.checkpoints import defect, last_checkpoint
from loglinear.runs.folder import claim, read_run, run_recipe
from loglinear.runs.loading import load_model
from loglinear.runs.metrics import read_metrics
from loglinear.runs.provenance import command
from loglinear.training import callbacks
from loglinear.training.train import train
from tests.training.tiny import assert_same_run, curve, tiny_recipe, write_text

# Trains the tiny recipe in a process of its own, which `sabotage` ends somewhere.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from accelerate import PartialState
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
from loglinear.training import callbacks, train
from tests.training.tiny import tiny_recipe
data, out = map(Path, sys.argv[1:3])
{sabotage}
result = train(tiny_recipe(data), out, progress=False)
PartialState().destroy_process_group()
sys.exit(130 if result.interrupted else 0)
"""
AT_STEP_5 = """
append = callbacks.RunLog._append
def sabotaged(self, **record):
    append(self, **record)
    if record["step"] == 5:
        os.kill(os.getpid(), signal.{signal})
callbacks.RunLog._append = sabotaged
"""
WHILE_SAVING_STEP_4 = """
save = torch.save
def sabotaged(value, path, *args, **kwargs):
    if str(path).endswith("checkpoint-4/optimizer.pt"):
        Path(path).write_bytes(b"half an optim")
        os.kill(os.getpid(), signal.SIGKILL)
    return save(value, path, *args, **kwargs)
torch.save = sabotaged
"""


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def run_sabotaged(sabotage, data, out):
    command = [sys.executable, "-c", SCRIPT.format(sabotage=sabotage), str(data), str(out)]
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    return process.returncode, process.stderr


def test_run_learns_and_logs_every_step(whole):
    records = curve(whole)
    training = [record for record in records if record["split"] == "train"]
    assert [record["step"] for record in training] == list(range(1, 9))
    assert [record["step"] for record in records if record["split"] == "validation"] == [4, 8]
    assert training[-1]["loss"] < training[0]["loss"] - 0.5
    assert training[-1]["tokens"] == 8 * 128


def test_learning_rate_warms_up_and_falls_to_a_tenth(whole):
    rates = [record["learning_rate"] for record in curve(whole) if record["split"] == "train"]
    assert rates[0] == 0 and rates[2] == max(rates) == 1e-2
    assert 1e-3 < rates[-1] < 3e-3


def test_sigkill_then_resume_gives_the_uninterrupted_curve_bit_for_bit(tmp_path, data, whole):
    out = tmp_path / "run"
    code, _ = run_sabotaged(AT_STEP_5.format(signal="SIGKILL"), data, out)
    assert code == -signal.SIGKILL
    assert [record["step"] for record in curve(out)][-1] == 5 and last_checkpoint(out).name == "checkpoint-4"
    train(tiny_recipe(data), out, resume=True, progress=False)
    assert_same_run(out, whole)


def test_kill_in_the_middle_of_saving_leaves_the_previous_checkpoint_whole(tmp_path, data, whole):
    out = tmp_path / "run"
    code, _ = run_sabotaged(WHILE_SAVING_STEP_4, data, out)
    assert code == -signal.SIGKILL
    assert (out / ".saving" / "checkpoint-4" / "optimizer.pt").exists()  # it really was in the middle
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert defect(out / "checkpoint-2", resumable=True) is None
    train(tiny_recipe(data), out, resume=True, progress=False)
    assert_same_run(out, whole)
    assert not (out / ".saving").exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signal_saves_the_running_step_and_resumes_exactly(tmp_path, data, whole, name):
    out = tmp_path / "run"
    code, errors = run_sabotaged(AT_STEP_5.format(signal=name), data, out)
    assert code == 130 and "Traceback" not in errors
    assert last_checkpoint(out).name in ("checkpoint-5", "checkpoint-6")  # logging follows the step's end
    train(tiny_recipe(data), out, resume=True, progress=False)
    assert_same_run(out, whole)


def test_a_signal_in_the_last_step_is_not_forgotten(tmp_path, data, monkeypatch):
    append = callbacks.RunLog._append

    def asked_to_stop(log, **record):
        append(log, **record)
        if record["step"] == 8 and record["split"] == "train":
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(callbacks.RunLog, "_append", asked_to_stop)
    result = train(tiny_recipe(data), tmp_path / "run", progress=False)
    assert (result.step, result.interrupted) == (8, True) and result.checkpoint.name == "checkpoint-8"
    assert not train(tiny_recipe(data), tmp_path / "run", resume=True, progress=False).interrupted


def test_minutes_stop_at_a_step_and_resume_exactly(tmp_path, data, whole):
    out = tmp_path / "run"
    for step in (1, 2, 3, 4):  # a time that has passed already still takes one step; the fourth is validated
        result = train(tiny_recipe(data), out, resume=step > 1, minutes=1e-9, progress=False)
        assert (result.step, result.interrupted) == (step, True)
        assert result.checkpoint == out / f"checkpoint-{step}"
    result = train(tiny_recipe(data), out, resume=True, minutes=60, progress=False)
    assert (result.step, result.interrupted) == (8, False)
    assert_same_run(out, whole)


@pytest.mark.parametrize("minutes", [0, -1, math.nan])
def test_minutes_must_be_positive(tmp_path, data, minutes):
    with pytest.raises(ValueError, match="minutes must be positive, got"):
        train(tiny_recipe(data), tmp_path / "run", minutes=minutes, progress=False)


def test_incomplete_checkpoint_is_never_resumed_from(tmp_path, data, whole):
    out = tmp_path / "run"
    train(tiny_recipe(data), out, progress=False)
    assert last_checkpoint(out).name == "checkpoint-8"
    for name, newest in (("optimizer.pt", "checkpoint-6"), ("model.safetensors", "checkpoint-4")):
        file = last_checkpoint(out) / name
        file.write_bytes(file.read_bytes()[:-100])
        assert last_checkpoint(out).name == newest
    result = train(tiny_recipe(data), out, resume=True, progress=False)
    assert result.checkpoint == last_checkpoint(out) == out / "checkpoint-8"
    assert_same_run(out, whole)


def test_resuming_a_finished_run_changes_nothing(whole, data):
    before = (whole / "metrics.jsonl").read_bytes()
    result = train(tiny_recipe(data), whole, resume=True, progress=False)
    assert (result.step, result.interrupted) == (8, False)
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_bits_per_byte_counts_predicted_text_alone(whole, data):
    first = curve(whole)[0]
    training, _ = load_corpus([str(data)], ByteTokenizer(), 0.25)
    row = PackedRows(training, seq_len=64, row_tokens=128, shuffle_seed=0)[0]
    predicted = row["labels"][row["labels"] != IGNORED]
    expected = first["loss"] * len(predicted) / math.log(2) / int((predicted < 256).sum())
    assert first["bits_per_byte"] == pytest.approx(expected, rel=1e-9)


def test_batch_without_anything_to_predict_is_one_clear_line(tmp_path, data):
    with pytest.raises(ValueError, match="holds no text to predict: raise --batch-tokens"):
        train(tiny_recipe(data, batch_tokens=2, seq_len=2, steps=400), tmp_path / "run", progress=False)


def test_one_process_trains_on_one_gpu_of_several(tmp_path, data, monkeypatch):
    class OnTwoGpus(TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2  # what transformers sets where it sees two

    monkeypatch.setattr("loglinear.training.trainer.TrainingArguments", OnTwoGpus)
    arguments = sys.modules["loglinear.training.train"]._arguments(tiny_recipe(data), tmp_path, 1, False)
    assert (arguments.n_gpu, arguments.train_batch_size, arguments.eval_batch_size) == (1, 1, 1)


def test_checkpoint_uses_the_cache(whole):
    assert json.loads((last_checkpoint(whole) / "config.json").read_text())["use_cache"] is True


def with_extra_key(run):
    return {**run, "recipe": {**run["recipe"], "surplus": 1}}


def with_null_steps(run):
    return {**run, "recipe": {**run["recipe"], "steps": None}}


def with_broken_model(run):
    return {**run, "recipe": {**run["recipe"], "model": {"hidden_size": None}}}


@pytest.mark.parametrize("change", [lambda run: {}, lambda run: [], with_extra_key, with_null_steps, with_broken_model])
def test_damaged_run_json_is_one_clear_line(tmp_path, whole, change):
    run = json.loads((whole / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(change(run)))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "run.json"))):
        run_recipe(tmp_path)


@pytest.mark.parametrize("line", [b"{broken", b"\xff", b"[]", b"{}", b"[" * 100_000])
def test_damaged_metrics_name_file_and_line(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'metrics.jsonl'} line 2")):
        read_metrics(tmp_path)


def test_only_the_newest_checkpoints_are_kept(whole):
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (4, 6, 8)]


def test_both_twins_read_the_same_rows(tmp_path, data, whole):
    out = tmp_path / "twin"
    train(tiny_recipe(data).override(num_levels=1), out, progress=False)
    stored = [read_run(path) for path in (out, whole)]
    assert stored[0]["data"] == stored[1]["data"]
    different = {k for k, v in stored[0]["recipe"].items() if v != stored[1]["recipe"][k]}
    assert different == {"model"}


def test_gradient_accumulation_gives_the_curve_of_the_whole_batch(tmp_path):
    for index in range(8):  # 160 tokens each: all cuts fall on multiples of 16, in rows of 64 as in rows of 128
        (tmp_path / f"{index}.txt").write_text(f"{index} and so on and on. "[:16] * 9 + "0123456789abcd")
    recipe = tiny_recipe(tmp_path / "*.txt", seq_len=16, steps=4)
    train(recipe, tmp_path / "whole", progress=False)
    train(recipe.override(micro_batch_tokens=64), tmp_path / "parts", progress=False)
    whole, parts = (
        [record["loss"] for record in curve(tmp_path / name) if record["split"] == "train"]
        for name in ("whole", "parts")
    )
    assert parts == pytest.approx(whole, rel=1e-5)


def test_two_processes_give_the_curve_of_one_that_accumulates(tmp_path, data):
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.format(sabotage="").replace("tiny_recipe(data)", "tiny_recipe(data, micro_batch_tokens=64)")
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*command, str(script), str(data), str(tmp_path / "two")], env=ENVIRONMENT, check=True, capture_output=True
    )
    assert b"[transformers]" not in run.stderr
    train(tiny_recipe(data, micro_batch_tokens=64), tmp_path / "one", progress=False)
    assert curve(tmp_path / "two") == curve(tmp_path / "one")


def test_run_json_has_what_decides_the_result(whole, data):
    run = json.loads((whole / "run.json").read_text())
    assert run["seed"] == 0 and run["recipe"] == tiny_recipe(data).to_dict()
    assert run["versions"]["torch"] == torch.__version__ and run["command"] == command()
    model = load_model(whole)
    assert run["parameters"] == model.num_parameters() and run["model"]["num_levels"] == model.config.num_levels


def test_checkpoint_carries_the_tokenizer(whole):
    from transformers import AutoTokenizer

    checkpoint = last_checkpoint(whole)
    saved = AutoTokenizer.from_pretrained(checkpoint)
    assert saved("a")["input_ids"] == [97] and saved.bos_token_id == 256
    for file, name in {"config.json": "LogLinearForCausalLM", "tokenizer_config.json": "ByteTokenizer"}.items():
        assert f"loglinear_auto.{name}" in (checkpoint / file).read_text()
    assert "loglinear_auto.py" in (checkpoint / "manifest.json").read_text()


def test_transformers_loads_a_checkpoint_and_not_the_folder_of_a_run(whole):
    from transformers import AutoModelForCausalLM

    loaded, ours = AutoModelForCausalLM.from_pretrained(whole / "checkpoint-8"), load_model(whole)
    assert type(loaded) is type(ours)
    assert all(torch.equal(x, ours.state_dict()[name]) for name, x in loaded.state_dict().items())
    with pytest.raises((OSError, ValueError), match=re.escape(str(whole))):
        AutoModelForCausalLM.from_pretrained(whole)


def test_tensorboard_events_are_written(tmp_path, data):
    pytest.importorskip("tensorboard")
    train(tiny_recipe(data, steps=2), tmp_path / "run", progress=False, tensorboard=True)
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_diverging_loss_is_one_clear_line(tmp_path, data):
    recipe = tiny_recipe(data, warmup_steps=1)
    object.__setattr__(recipe, "learning_rate", 1e30)  # a recipe itself takes no such rate
    with pytest.raises(ValueError, match="the loss became .* at step"):
        train(recipe, tmp_path / "run", progress=False)


def test_folder_of_another_run_is_refused_without_resume(whole, data):
    with pytest.raises(ValueError, match="holds another run: add --resume"):
        train(tiny_recipe(data), whole, progress=False)


def test_folder_with_other_files_is_refused(tmp_path, data):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty"):
        train(tiny_recipe(data), tmp_path, progress=False)


def test_resume_with_another_recipe_names_the_difference(whole, data):
    with pytest.raises(ValueError, match="run with learning_rate = 0.01, which cannot resume with 0.02"):
        train(tiny_recipe(data, learning_rate=2e-2), whole, resume=True, progress=False)


def test_a_run_without_a_checkpoint_may_be_deleted(tmp_path, whole, data):
    (tmp_path / "run.json").write_text((whole / "run.json").read_text())
    with pytest.raises(ValueError, match="steps = 8, which cannot resume with 9; it has no checkpoint yet: delete"):
        train(tiny_recipe(data, steps=9), tmp_path, resume=True, progress=False)


def test_resume_with_another_model_names_the_field(whole, data):
    recipe = tiny_recipe(data, model=tiny_recipe(data).model | {"num_levels": 3})
    with pytest.raises(ValueError, match=r"run with model.num_levels = 6, which cannot resume with 3$"):
        train(recipe, whole, resume=True, progress=False)


def test_resume_of_weights_that_the_recipe_does_not_describe_is_refused(tmp_path, data, whole):
    """As where a default has changed that run.json does not name: the Trainer would leave such weights out."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(last_checkpoint(tmp_path / "run"))
    checkpoint = last_checkpoint(tmp_path / "run")
    other = LogLinearConfig.from_pretrained(checkpoint, lambda_form="softplus")
    LogLinearForCausalLM(other).save_pretrained(checkpoint)
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-6 holds .* than the run's recipe says: .*level_scales"):
        train(tiny_recipe(data), tmp_path / "run", resume=True, progress=False)


def test_resume_with_changed_text_is_refused(tmp_path):
    text = write_text(tmp_path / "text")
    train(tiny_recipe(text, steps=2), tmp_path / "run", progress=False)
    (text / "0.txt").write_text("other text\n" * 20)
    with pytest.raises(ValueError, match="has changed since it started"):
        train(tiny_recipe(text, steps=2), tmp_path / "run", resume=True, progress=False)


def test_resume_of_nothing_is_refused(tmp_path, data):
    with pytest.raises(ValueError, match="does not exist, expected the folder of a training run"):
        train(tiny_recipe(data), tmp_path / "run", resume=True, progress=False)


def test_folder_in_use_names_the_process(tmp_path, data):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, os, sys\nlock = open(sys.argv[1], 'w')\nfcntl.flock(lock, fcntl.LOCK_EX)\n"
            "lock.write(str(os.getpid())); lock.flush(); print('held', flush=True); sys.stdin.read()",
            str(tmp_path / ".lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(ValueError, match=rf"in use by another process \(pid {holder.pid}\)"):
            train(tiny_recipe(data), tmp_path, progress=False)
    finally:
        holder.communicate()
    with claim(tmp_path):  # the holder is gone, and with it the claim
        pass

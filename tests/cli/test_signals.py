"""Signals: one line and the usual exit code from the first moment of a command; while it trains, a checkpoint first."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loglinear.runs.checkpoints import checkpoints, defect
from loglinear.runs.metrics import read_metrics
from loglinear.signals import end, install, restore
from tests.cli.command_line import FAST, in_process
from tests.evaluation.mqar.tiny import TASK

REPOSITORY = Path(__file__).parents[2]
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
LINES = {"SIGINT": "interrupted\n", "SIGTERM": "ended by SIGTERM\n", "SIGHUP": "ended by SIGHUP\n"}
# Python imports this before anything else: it sends its process signals when a module is imported or a function called.
SITE = """
import importlib.abc, os, signal, sys
module, names = os.environ["AT_IMPORT_OF"], os.environ["SIGNALS"].split()
class Sender(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == module:
            for name in names:
                os.kill(os.getpid(), getattr(signal, name))
sys.meta_path.insert(0, Sender())
"""


def as_from_a_terminal():
    """A test run in the background of a shell would hand an ignored SIGINT down."""
    for name in CODES:
        signal.signal(getattr(signal, name), signal.SIG_DFL)


def start(*command, ready=as_from_a_terminal, **environment):
    path = os.pathsep.join([*environment.pop("PYTHONPATH", []), str(REPOSITORY)])
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment, "PYTHONPATH": path},
        preexec_fn=ready,
        start_new_session=True,
    )


def finish(process):
    out, errors = process.communicate(timeout=120)
    return process.returncode, out, errors


@pytest.mark.parametrize(
    ("command", "module", "name"),
    [
        ("loglinear.cli info", "loglinear.cli.app", "SIGINT"),
        ("loglinear.cli info", "typer", "SIGHUP"),
        ("loglinear.cli info", "numpy", "SIGINT"),
        ("loglinear.cli demo", "torch", "SIGTERM"),
        ("loglinear.cli train --recipe demo --data nothing --out {out}", "accelerate", "SIGINT"),
        ("experiments.long_text run --help", "torch", "SIGINT"),
        ("experiments.needle run --help", "numpy", "SIGHUP"),
        ("benchmarks.ops --help", "torch", "SIGTERM"),
        ("loglinear.cli bench ops --rounds 1", "torch", "SIGINT"),
    ],
)
def test_a_signal_while_a_command_starts_is_one_line(tmp_path, command, module, name):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    signals = " ".join([name] * 5)
    arguments = command.format(out=tmp_path / "out").split()
    process = start(*arguments, AT_IMPORT_OF=module, SIGNALS=signals, PYTHONPATH=[str(tmp_path)])
    assert finish(process) == (CODES[name], "", LINES[name])


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize(
    ("function", "command"),
    [
        ("loglinear.training.train.load_corpus", "demo --steps 2 --out {out}"),
        ("loglinear.training.start.LogLinearForCausalLM", "train --recipe demo --data {text} --out {out}"),
        ("loglinear.cli.perplexity.evaluate_perplexity", "eval perplexity --model {run} --data {text} --out {out}"),
        (
            "loglinear.cli.membership.evaluate_membership",
            "eval membership --model {run} --members {text} --others {text}",
        ),
        ("loglinear.cli.generate.sample", "generate --model {run} --prompt a"),
    ],
)
def test_a_signal_outside_of_training_is_one_line(capfd, monkeypatch, tmp_path, run, text, function, command, name):
    class Exited(BaseException):
        pass

    def exited(code):
        raise Exited(code)

    def signalled(*args, **kwargs):
        signal.raise_signal(getattr(signal, name))

    arguments = [part.format(run=run, text=text, out=tmp_path / "out") for part in command.split()]
    monkeypatch.setattr(os, "_exit", exited)
    module, _, attribute = function.rpartition(".")
    __import__(module)
    monkeypatch.setattr(sys.modules[module], attribute, signalled)
    with pytest.raises(Exited) as exit_:
        in_process(capfd, *arguments)
    assert exit_.value.args == (CODES[name],)
    assert capfd.readouterr().err == LINES[name]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def begun(process, file):
    """Wait until the process has written to a file."""
    while not file.exists() or file.stat().st_size == 0:
        assert process.poll() is None, process.communicate()[1]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])  # SIGINT is in test_cli.py
def test_a_signal_while_training_saves_says_how_to_resume_and_ends_with_its_code(tmp_path, text, name):
    out = tmp_path / "run"
    arguments = ["--recipe", "demo", "--data", text, "--out", out, *FAST[2:], "--steps", "4000"]
    process = start("loglinear.cli", "train", *arguments)
    begun(process, out / "metrics.jsonl")
    process.send_signal(getattr(signal, name))
    code, _, errors = finish(process)
    lines = errors.strip().splitlines()
    assert code == CODES[name] and "Traceback" not in errors
    assert errors.count("stopping after this step and saving; Ctrl-C again stops at once") == 1
    assert lines[-1].startswith("stopped at step ") and lines[-1].endswith(f"loglinear train --resume --out {out}")
    last = checkpoints(out)[-1]
    assert defect(last, resumable=True) is None
    assert last.name == f"checkpoint-{read_metrics(out)[-1]['step']}"


# In the middle of writing the optimizer's state of a checkpoint that the first signal asked for.
WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
import torch
from loglinear.cli import main
from loglinear.training import callbacks
from loglinear.runs.metrics import append_metrics
names = os.environ["SIGNALS"].split()
def stop(out, record):
    append_metrics(out, record)
    if record["step"] == 3:
        os.kill(os.getpid(), getattr(signal, names[0]))
save = torch.save
def saving(value, path, *args, **kwargs):
    if str(path).endswith("optimizer.pt") and "checkpoint-2" not in str(path):
        Path(path).write_bytes(b"half an optim")
        for name in names[1:]:
            os.kill(os.getpid(), getattr(signal, name))
    return save(value, path, *args, **kwargs)
callbacks.append_metrics, torch.save = stop, saving
main()
"""


@pytest.mark.parametrize(
    ("names", "code", "whole"),
    [
        ("SIGINT SIGINT", 130, ["checkpoint-2"]),
        ("SIGTERM SIGTERM SIGHUP SIGTERM", 143, ["checkpoint-2", "checkpoint-4"]),
    ],
)
def test_a_second_signal_while_saving_damages_nothing(capsys, tmp_path, text, names, code, whole):
    out = tmp_path / "run"
    script = tmp_path / "script.py"
    script.write_text(WHILE_SAVING)
    arguments = ["--recipe", "demo", "--data", text, "--out", out, *FAST[2:], "--steps", "6"]
    process = subprocess.Popen(
        [sys.executable, str(script), "train", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "SIGNALS": names, "PYTHONPATH": str(REPOSITORY)},
        preexec_fn=as_from_a_terminal,
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code and "Traceback" not in errors
    assert errors.endswith("interrupted\n") == (code == 130)
    assert [path.name for path in checkpoints(out) if defect(path, resumable=True) is None] == whole
    assert [path.name for path in checkpoints(out)] == whole
    code, _, errors = in_process(capsys, "train", "--resume", "--out", out)
    assert code == 0, errors
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6


def test_signals_to_all_processes_of_a_table_let_its_cells_save(tmp_path):
    options = ["--model", "attention", "--dim", "16", "--dim", "32", "--lr", "1e-2", "--seed", "0", "--epochs", "9999"]
    task = ["--length", TASK.length, "--pairs", "1", "--examples", "20000", "--processes", "2"]
    process = start("loglinear.cli", "eval", "mqar", *options, *task, "--out", tmp_path)
    for dim in (16, 32):
        while not list(tmp_path.glob(f"unfinished/*dim{dim}*/cell.json")):
            assert process.poll() is None, process.communicate()[1]
    os.killpg(process.pid, signal.SIGHUP)
    os.killpg(process.pid, signal.SIGTERM)
    code, _, errors = finish(process)
    assert code == 129 and "Traceback" not in errors, errors
    assert errors.splitlines()[-1].startswith("0 of 2 cells finished, checkpoints of the running ones saved")
    saved = [checkpoints(folder) for folder in tmp_path.glob("unfinished/*")]
    assert len(saved) == 2 and all(len(found) == 1 and defect(found[0], resumable=True) is None for found in saved)


def test_an_ignored_signal_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        installed = install(end)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and signal.getsignal(signal.SIGTERM) is end
        restore(installed)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, previous)

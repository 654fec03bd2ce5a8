"""Every option of every command, with values that mean nothing: each ends in one line, and none in a traceback."""

import importlib
import pkgutil
import signal
from inspect import signature
from typing import get_args, get_type_hints

import click
import pytest
import typer.main
import uvicorn

import experiments
from loglinear.cli.app import app
from tests.cli.command_line import in_process
from tests.convert.test_transformers import mamba2
from tests.upgrades.tiny import original

VALUES = ["", "-1", "1" + "0" * 30, "nan", "a\udcffb", "x" * 5000, "{file}", "{folder}"]
TINY = "--steps 1 --seq-len 32 --batch-tokens 64 --eval-every 1 --save-every 1"
CALLS = {  # that work; {out} is a folder that is not there
    "train": f"train --recipe demo --data {{text}} --out {{out}} {TINY}",
    "convert": "convert --from transformers {foreign} {out} --num-levels 3",
    "upgrade": "upgrade --model {pretrained} --out {out} --num-levels 3",
    "generate": "generate --model {run} --prompt a --max-new-tokens 1",
    "perplexity": "eval perplexity --model {run} --data {text} --out {out} --length 64",
    "needle": "eval needle --model {run} --out {out} --length 800 --examples 1 --task single_1",
    "entropy": "eval entropy --model {run} --prompt a --max-new-tokens 1 --out {out}",
    "membership": "eval membership --model {run} --members {text} --others {others} --max-tokens 32 --out {out}",
    "mqar": "eval mqar --model attention --dim 16 --lr 1e-2 --seed 0 --examples 64 --epochs 1 --length 8 --pairs 2 "
    "--processes 1 --minutes 1e-9 --out {out}",
    "info": "info",
    "tune": "tune",
    "demo": "demo --steps 1 --out {out}",
    "serve": "serve --model {run}",
}
SECONDS = 60  # after which a command hangs


def commands(command):
    for name, sub in getattr(command, "commands", {}).items():
        yield from commands(sub) if hasattr(sub, "commands") else [(name, sub)]


COMMANDS = dict(commands(typer.main.get_command(app)))


def without(call, option):
    """The call without an option and its value."""
    if option not in call:
        return call
    place = call.index(option)
    return call[:place] + call[place + 2 :]


def test_no_command_is_left_out():
    assert set(CALLS) == set(COMMANDS) - {"ops"}  # its options are those of a benchmark: see test_mistakes


@pytest.fixture
def places(tmp_path, run, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: None)
    monkeypatch.setattr("loglinear.cli.demo.run", lambda recipe, out: recipe.model_config())
    (tmp_path / "file").write_bytes(b"\xff\0")
    (tmp_path / "folder").mkdir()
    mamba2(tmp_path / "foreign", n_groups=1)
    original("qwen3_5").save_pretrained(tmp_path / "pretrained")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "text.txt").write_text("other text")
    names = ("out", "file", "folder", "foreign", "pretrained", "others")
    return {"run": run, "text": text, **{name: tmp_path / name for name in names}}


@pytest.fixture
def no_hanging():
    def hangs(*args):
        raise AssertionError("the command hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def functions(program):
    """The functions behind the commands of a program."""
    for command in program.registered_commands:
        yield command.callback
    for group in program.registered_groups:
        yield from functions(group.typer_instance)


def programs():
    yield app
    for module in pkgutil.walk_packages(experiments.__path__, "experiments."):
        if not module.name.endswith("__main__"):
            found = getattr(importlib.import_module(module.name), "app", None)
            yield from [found] if isinstance(found, typer.Typer) else []


# One of few values, which the recipe names.
CHOSEN = {("experiments.capacity", "load"), ("experiments.descent", "load")}


def test_every_number_has_a_range():
    """Its callback refuses the values outside, and its error has the value and the range, which typer's has not."""
    seen = 0
    for function in {function: None for program in programs() for function in functions(program)}:
        hints = get_type_hints(function, include_extras=True)
        for name in signature(function).parameters:
            kind, *info = get_args(hints[name]) or (None,)
            if not info or not {int, float} & {
                kind,
                *get_args(kind),
                *(a for k in get_args(kind) for a in get_args(k)),
            }:
                continue
            seen += 1
            place = (function.__module__, name)
            assert (info[0].callback is None) == (place in CHOSEN), place
            assert info[0].min is None and info[0].max is None, place
    assert seen > 100


@pytest.mark.usefixtures("no_hanging")
@pytest.mark.parametrize("name", CALLS)
def test_an_option_without_sense_is_one_line(capsys, places, name):
    options = [p for p in COMMANDS[name].params if not getattr(p, "is_flag", False) and isinstance(p, click.Parameter)]
    refused = 0
    for option, value in ((option, value) for option in options for value in VALUES):
        flag = option.opts[0]
        given = (
            [value.format(**places)] if option.param_type_name == "argument" else [f"{flag}={value.format(**places)}"]
        )
        call = without([part.format(**places) for part in CALLS[name].split()], flag) + given
        code, _, errors = in_process(capsys, *call)
        assert code in (0, 2, 130), call
        if code == 2:
            refused += 1
            assert errors.startswith("error: ") and errors.count("\n") == 1 and len(errors) < 1100, (call, errors)
    assert refused >= len(options)  # at least the empty value

"""Every command line of the documents is executed, or its test is named, or at least its options exist."""

import io
import re
import runpy
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest
import typer

from benchmarks import machine
from loglinear import cli
from loglinear.cli.app import app
from tests.documents.commands import BENCHMARKS, EXECUTED, READ, TESTED
from tests.documents.pages import PAGES, ROOT, command_lines, mentioned_commands

TOOLS = re.compile(r"make |(python -m )?pytest |python -m tests\.")
CHECKED = [page for page in PAGES if page != "CHANGELOG.md" and not page.startswith("docs/lab-notes/")]
MENTIONED = {command: page for page in CHECKED for command in mentioned_commands(page)}
LINES = {command: page for page in CHECKED for command in command_lines(page)}
FOLLOWED = tuple(f"docs/{place}" for place in ("getting-started.md", "guides/", "results/", "benchmarks/"))
STEPS = {  # what a reader is told to run
    command: page
    for page in CHECKED
    if page == "README.md" or page.startswith(FOLLOWED)
    for command in command_lines(page)
}


def programs(shown: dict[str, str]) -> list[str]:
    """The command lines of our own programs."""
    return [command for command in shown if not TOOLS.match(command)]


def program(command: str) -> tuple[typer.Typer, list[str]]:
    """The program of a command line, without running it, and its arguments."""
    words = shlex.split(command)
    if words[0] == "loglinear":
        return app, words[1:]
    found: list[typer.Typer] = []
    take = mock.Mock(side_effect=lambda app, *_: found.append(app))
    with mock.patch.object(cli, "execute", take), mock.patch.object(machine, "execute", take):
        runpy.run_module(words[2], run_name="__main__")
    return found[0], words[3:]


def read(command: str) -> None:
    """Raise the error of typer's that a wrong command, option or value gets."""
    found, arguments = program(command)
    place, arguments = typer.main.get_command(found), [*arguments]
    while hasattr(place, "commands"):
        assert arguments and arguments[0] in place.commands, f"{command}: there is no such command"
        place = place.commands[arguments.pop(0)]
    if arguments and "--help" not in arguments:
        place.make_context("", arguments)


@pytest.mark.parametrize("command", programs(LINES))
def test_options_of_command_lines_exist(command):
    read(command)


@pytest.mark.parametrize("command", programs(MENTIONED))
def test_options_of_commands_in_sentences_exist(command):
    try:
        read(command)
    except Exception as error:
        assert type(error).__name__ == "MissingParameter", f"{MENTIONED[command]}: {command}: {error}"


def test_every_command_line_is_known():
    known = {*EXECUTED, *BENCHMARKS, *TESTED, *(command for commands in READ.values() for command in commands)}
    unknown = [f"{STEPS[command]}: {command}" for command in programs(STEPS) if command not in known]
    assert not unknown, "add to EXECUTED, BENCHMARKS, TESTED or READ in tests/documents/commands.py:\n" + "\n".join(
        unknown
    )
    gone = known - set(STEPS)
    assert not gone, "no page shows these any more; take them out of tests/documents/commands.py:\n" + "\n".join(gone)


@pytest.mark.parametrize("test", sorted(set(TESTED.values())))
def test_tests_that_are_named_exist(test):
    file, _, function = test.partition("::")
    assert f"\ndef {function}(" in (ROOT / file).read_text()


def test_make_and_pytest_lines_name_what_there_is():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    markers = re.findall(r'^  "(\w+):', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for command, page in {**LINES, **MENTIONED}.items():
        words = shlex.split(command.removeprefix("python -m "))
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), f"{page}: {command}"
        elif TOOLS.match(command):
            files = [word.split("::")[0] for word in words if "/" in word]
            files += [f"{word.replace('.', '/')}.py" for word in words if word.startswith("tests.")]
            assert all((ROOT / file).exists() for file in files), f"{page}: {command}"
            assert "-m" not in words or words[words.index("-m") + 1] in markers, f"{page}: {command}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, which is the reader's home as well and has two small folders of text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    (tmp_path / "results").mkdir()
    text = (ROOT / "README.md").read_text()[:3000]
    for name in ("books", "letters"):
        (tmp_path / name).mkdir()
        for number in range(8):
            (tmp_path / name / f"{number}.txt").write_text(f"{name} {number}\n" + text)
    return tmp_path


def execute(command: str, flags: str, monkeypatch, capsys) -> None:
    """Run a command line in this process, as a shell would pass it on, with "Once" on standard input."""
    found, arguments = program(command)
    words = [*arguments, *flags.split()]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once"))
    with pytest.raises(SystemExit) as exit_:
        cli.execute(found, "loglinear", [str(Path(word).expanduser()) if word[0] == "~" else word for word in words])
    _, errors = capsys.readouterr()
    assert exit_.value.code == 0, f"{command}: {errors}"


def test_commands_run(folder, monkeypatch, capsys):
    """One after the other, as a reader runs them."""
    for command, flags in EXECUTED.items():
        execute(command, flags, monkeypatch, capsys)
    assert (folder / "runs/books/needle/needle.png").is_file() and (folder / "runs/first/perplexity").is_dir()


@pytest.mark.parametrize("command", BENCHMARKS)
def test_benchmarks_run(command, folder, monkeypatch, capsys):
    execute(command, BENCHMARKS[command], monkeypatch, capsys)
    assert len(list((folder / "results").glob("*.json"))) == 1

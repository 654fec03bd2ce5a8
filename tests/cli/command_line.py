"""Calling the command line, in this process or in one of its own."""

import subprocess
import sys

import pytest

from loglinear.cli import main

FAST = ["--steps", "2", "--seq-len", "32", "--batch-tokens", "64", "--eval-every", "2", "--save-every", "2"]


def in_process(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def in_subprocess(*arguments):
    result = subprocess.run(
        [sys.executable, "-m", "loglinear.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    return result.returncode, result.stdout, result.stderr


def assert_one_line(result, message):
    """Every mistake of a user's ends with exit code 2 and one line that names it."""
    code, out, errors = result
    assert code == 2, errors
    assert message in errors and errors.count("\n") == 1 and errors.startswith("error: ")
    assert "Traceback" not in errors and out == ""

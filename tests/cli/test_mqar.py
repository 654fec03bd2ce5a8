"""`loglinear eval mqar`: a miniature from the command line, how it goes on, and mistakes in one line."""

import json

import pytest

from loglinear.cli import main
from loglinear.evaluation.mqar.cells import RecallTask
from tests.evaluation.mqar.tiny import result_of, tiny_cell

TASK = RecallTask(examples=64, epochs=1, length=8, pairs=(2,))
MINIATURE = ["--examples", "64", "--epochs", "1", "--length", "8", "--pairs", "2"]
CELL = ["--model", "attention", "--dim", "16", "--lr", "1e-2", "--seed", "0"]


def command(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["eval", "mqar", *map(str, arguments)])
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def test_one_cell_then_the_table_with_another_that_lies_there(capsys, tmp_path):
    (tmp_path / "cells").mkdir()
    other = tiny_cell(model="mamba2", task=TASK)
    (tmp_path / "cells" / f"{other.name}.json").write_text(json.dumps(result_of(other, 0.5)))
    code, out, errors = command(capsys, *CELL, *MINIATURE, "--out", tmp_path)
    assert code == 0 and "1 of 1 cell finished" in errors
    table = json.loads((tmp_path / "mqar.json").read_text())
    assert [(row["model"], row["seeds"]) for row in table["table"]] == [("mamba2", [0]), ("attention", [0])]
    assert out.splitlines()[0].startswith("| dim | model | decode state | KV cache | median |")
    assert out.splitlines()[2].startswith("| 16 | mamba2 | ") and " | 50.0 | - | 50.0 | " in out.splitlines()[2]
    assert len(table["cells"]) == 2 and table["task"]["pairs"] == [2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out"),
        (["--model", "mamba"], "unknown model 'mamba': did you mean 'mamba2'? There are mamba2, "),
        (["--dim", "24"], "dim must be a multiple of 16 up to 4096, got 24"),
        (["--lr", "0"], "'--lr': must be positive and at most 1, got 0.0"),
        (["--seed", "-1"], "'--seed': must lie between 0 and 4294967295, got -1"),
        (["--seed", "1", "--seed", "1"], "seeds must be one or more different values"),
        (["--length", "30"], "length must be even and at least 4 times the pairs (4, 8, 16, 32, 64), got 30"),
        (["--processes", "0"], "--processes"),
        (["--minutes", "-1"], "--minutes"),
        (
            ["--protocol", "zoology", "--model", "mamba2", "--dim", "16", "--seed", "3", "--seed", "0"],
            "seeds must not be tuning seeds (0, 1, 2) of protocol 'zoology', which choose among the learning rates, "
            "got 0",
        ),
        (["--epochs", "2"], "was made with epochs = 1, got 2: choose another --out"),
    ],
)
def test_mistakes_are_one_line_and_code_2(capsys, tmp_path, arguments, message):
    (tmp_path / "cells").mkdir()
    cell = tiny_cell(task=RecallTask(epochs=1))
    (tmp_path / "cells" / f"{cell.name}.json").write_text(json.dumps(result_of(cell, 0.5)))
    code, out, errors = command(capsys, *arguments, *(["--out", tmp_path] if arguments else []))
    assert code == 2 and message in errors and errors.count("\n") == 1 and errors.startswith("error: ") and out == ""

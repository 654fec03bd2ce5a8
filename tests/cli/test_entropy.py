"""`loglinear eval entropy` prints an answer and writes its page, its picture and its numbers."""

import io
import json
import sys

import numpy as np
from rich.console import Console

from loglinear.cli.entropy import _coloured
from loglinear.evaluation.entropy import SampledAnswer, SampledToken
from tests.cli.command_line import in_process

ARGUMENTS = ("--prompt", "line <1>", "--max-new-tokens", 30)


def test_the_files_and_the_terminal_have_the_same_answer(capsys, run, tmp_path):
    out = tmp_path / "new" / "entropy"
    code, printed, errors = in_process(capsys, "eval", "entropy", "--model", run, *ARGUMENTS, "--out", out)
    assert code == 0, errors
    result = json.loads((out / "entropy.json").read_text())
    assert result["settings"] == {
        **{"model": str(run), "max_new_tokens": 30, "temperature": 1.0, "seed": 0, "quantile": 0.2}
    }
    assert {"torch", "transformers", "loglinear"} <= set(result["versions"]) and "command" in result
    tokens = result["tokens"]
    assert len(tokens) == 30 and "".join(token["text"] for token in tokens) == result["answer"]
    entropies = [token["entropy"] for token in tokens]
    assert result["mean_entropy"] == np.mean(entropies) and result["threshold"] == np.quantile(entropies, 0.8)
    assert [token["forking"] for token in tokens] == [value >= result["threshold"] for value in entropies]
    assert printed.startswith("line <1>") and "forking tokens from" in printed and str(out) in printed
    assert f"{max(entropies):.4f}" in printed
    page = (out / "entropy.html").read_text()
    assert "line &lt;1&gt;" in page and page.count("--h:") == 31 and "seed: 0" in page
    assert (out / "entropy.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_folder_nothing_is_written_and_a_seed_repeats_the_answer(capsys, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, again, other = (
        in_process(capsys, "eval", "entropy", "--model", run, *ARGUMENTS, "--seed", seed) for seed in (1, 1, 2)
    )
    assert first[0] == 0 and first[1] == again[1] != other[1]
    assert not list(tmp_path.iterdir())


def test_the_prompt_may_come_by_a_pipe(capsys, run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("line <1>"))
    piped = in_process(capsys, "eval", "entropy", "--model", run, *ARGUMENTS[2:])
    assert piped[1] == in_process(capsys, "eval", "entropy", "--model", run, *ARGUMENTS)[1]


def test_the_terminal_underlines_forking_tokens_and_gets_no_control_character_of_the_model():
    texts = ["a", "\x1b[31m", "[bold]", "b"]
    tokens = (SampledToken(1, text, float(index == 3), -1.0) for index, text in enumerate(texts))
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", markup=False)
    console.print(_coloured(SampledAnswer("\x07", tuple(tokens), 0.2)), soft_wrap=True)
    printed = console.file.getvalue()
    assert "\x1b[31m" not in printed and "\x07" not in printed
    assert "\u2407" in printed and "\u241b[31m" in printed and "[bold]" in printed
    underlined = [part for part in printed.split("\x1b[") if part.startswith("1;4;")]
    assert len(underlined) == 1 and underlined[0].endswith("mb")

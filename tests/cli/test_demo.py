import json

import numpy as np
import pytest

from loglinear.cli.demo import run, verdict
from loglinear.evaluation import Perplexity
from tests.training.tiny import tiny_recipe, write_text


def test_demo_writes_everything_it_promises_and_continues_a_finished_run(tmp_path, capsys):
    recipe = tiny_recipe(write_text(tmp_path / "text"), steps=4)
    out = tmp_path / "demo"
    run(recipe, out)
    printed = capsys.readouterr().out
    for name in ("loss.png", "per_position.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    for model in ("log_linear", "linear"):
        assert (out / model / "checkpoint-4" / "model.safetensors").is_file()
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {record["model"] for record in records} == {"log_linear", "linear"}
    assert {record["split"] for record in records} == {"train", "validation"}
    results = json.loads((out / "results.json").read_text())
    assert results["log_linear"]["parameters"] > results["linear"]["parameters"]
    for model in ("log_linear", "linear"):
        assert f"{results[model]['validation']['bits_per_byte']:.4f}" in printed
        assert results[model]["state_bytes"] > 0 and results[model]["tokens_per_second"] > 0
    before = (out / "metrics.jsonl").read_bytes()
    run(recipe, out)
    assert (out / "metrics.jsonl").read_bytes() == before


def result(nats):
    counts, none = np.array([100, 100, 100]), np.zeros((0, 7))
    return Perplexity(("a", "b", "c"), np.array(nats), counts, counts, 8, none, none, np.zeros(0, int))


@pytest.mark.parametrize(
    ("log_linear", "expected"),
    [
        ([190.0, 191.0, 189.5], "log-linear model is better"),
        ([210.0, 211.0, 209.5], "linear model is better"),
        ([180.0, 221.0, 200.0], "do not differ beyond the error"),
    ],
)
def test_verdict_says_honestly_which_is_better(log_linear, expected):
    assert expected in verdict(result(log_linear), result([200.0, 200.0, 200.0]))

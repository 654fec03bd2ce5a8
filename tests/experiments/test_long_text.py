"""The experiment on a tiny model and a tiny text, and what is drawn of its results."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from experiments import figures, long_text
from experiments.corpus import LongDocument
from experiments.prepare import write_documents
from experiments.recipes.comparison import KINDS
from experiments.results import read_results
from loglinear.cli.console import Interrupted
from loglinear.runs.json_files import read_object, write_object
from tests.training.tiny import tiny_recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Nine documents to train on, and five to validate, of which three are as long as four training lengths."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.prepare.LEVEL", 3)
        for name, sizes in (("train", [400] * 9), ("validation", [100, 254, 255, 400, 200, 300])):
            documents = [
                LongDocument(f"{name}{i}", "".join(rng.choices("ab c", k=n)), False) for i, n in enumerate(sizes)
            ]
            write_documents(folder / f"{name}.jsonl.zst", documents)
    return folder


def in_pieces(folder, data, windows):
    """Run a tiny model in three calls. Return the names of its files."""
    call = {"kind": "capped", "out": folder / "run", "data": data, "results": folder / "results", "windows": windows}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_text, "kind_recipe", lambda name, kind, miniature: tiny_recipe(data, name=f"{name}_{kind}"))
        for step in (1, 2):
            with pytest.raises(Interrupted, match=f"stopped at step {step} of 8"):
                long_text.run(**call, minutes=1e-9)
        long_text.run(**call)
    with pytest.raises(ValueError, match="holds a run of long_text.*_capped, expected long_text.*_linear"):
        long_text.run(**{**call, "kind": "linear"})
    return [path.name for path in (folder / "results").iterdir()]


@pytest.fixture(scope="module")
def far(tmp_path_factory, data):
    """The result of `run`."""
    folder = tmp_path_factory.mktemp("far")
    assert in_pieces(folder, data, "8k") == ["long-text-8k-capped.json"]
    return read_object(folder / "results" / "long-text-8k-capped.json")


@pytest.fixture(scope="module")
def result(tmp_path_factory, data):
    """The result of `run` in the earlier round."""
    folder = tmp_path_factory.mktemp("runs")
    assert in_pieces(folder, data, "16k") == ["long-text-capped.json"]
    return read_object(folder / "results" / "long-text-capped.json")


def test_the_same_text_is_predicted_from_all_contexts(far):
    evaluation = far["evaluation"]
    assert len(evaluation["documents"]) == 5  # of 128 tokens or more, <bos> and <eos> included
    assert list(evaluation["contexts"]) == ["8", "16", "32", "64", "128"] and evaluation["targets"] == 5 * 2 * 64
    assert all(0 < bits["bits_per_byte"] < 12 for bits in evaluation["contexts"].values())
    assert len(json.dumps(far)) < 10_000


def test_other_windows_are_refused(tmp_path, data):
    with pytest.raises(ValueError, match="--windows must be 8k or 16k, got '4k'"):
        long_text.run("linear", tmp_path / "run", data, "4k")


def test_missing_data_says_how_to_make_it(tmp_path):
    with pytest.raises(ValueError, match="train.jsonl.zst: run `python -m experiments.long_text prepare`"):
        long_text.run("linear", tmp_path / "run", data=tmp_path)


def test_both_lengths_are_evaluated_on_the_same_text(result):
    evaluation = result["evaluation"]
    assert evaluation["documents"] == 4  # of 256 tokens or more, <bos> and <eos> included
    assert [evaluation[length]["full_windows"] for length in ("64", "256")] == [16, 4]
    assert evaluation["64"]["tokens"] == 16 * 63 and evaluation["256"]["tokens"] == 4 * 255
    curves = evaluation["256"]["by_document"]
    assert len(curves["position"]) == 16 and np.shape(curves["bits_per_byte"]) == (4, 16)


def test_result_says_what_it_cost_and_what_it_depends_on(result):
    assert result["parameters"] > 0 and result["seed"] == 0 and result["versions"]["device"]
    training = result["training"]
    assert training["tokens"] == 8 * 128 and training["minutes"] > 0 and training["peak_bytes"] is None
    assert [point["step"] for point in training["curve"]] == [1, 2, 3, 4, 5, 6, 7, 8, 4, 8]
    assert len(json.dumps(result)) < 10_000


def test_figures_and_table_are_drawn_of_the_results_that_there_are(tmp_path, result, capsys):
    results, out = tmp_path / "results", tmp_path / "figures"
    results.mkdir()
    with pytest.raises(ValueError, match="is no folder"):
        figures.main(tmp_path / "missing", out)
    with pytest.raises(ValueError, match="results has no result of an experiment"):
        figures.main(results, out)
    for kind in ("linear", "log_linear"):
        write_object(results / f"long-text-{kind}.json", {**result, "kind": kind})
    capsys.readouterr()
    figures.main(results)
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    out = results / "figures"  # a folder of its own, as the results have
    assert set(written) == set(out.iterdir())
    assert {path.name for path in out.glob("long-text-*.svg")} == {
        f"long-text-{n}{theme}.svg" for n in ("positions", "differences", "training") for theme in ("", "-dark")
    }
    table = (out / "long-text.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:4]] == ["| linear", "| log-linear"]
    assert table[3].count("+0.0000 ± 0.0000") == 2 and table[2].count("±") == 0
    assert list(read_results(results, "long-text", KINDS)) == ["linear", "log_linear"]

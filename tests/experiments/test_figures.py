"""Figures and tables of results that were made up: what a table says is what the results say."""

import math
from pathlib import Path

import numpy as np
import pytest

from experiments.figures.ablations import ablations
from experiments.figures.long_text import difference
from experiments.figures.memory import memory
from experiments.figures.mqar import mqar
from experiments.figures.needle import needle
from experiments.figures.pictures import pictures as draw_pictures
from experiments.figures.recall import conclusion
from experiments.figures.speed import speed
from loglinear.evaluation.mqar import gather
from loglinear.evaluation.needle import NeedleScores
from loglinear.runs.json_files import write_object
from tests.evaluation.mqar.tiny import result_of, tiny_cell

RESULTS = Path(__file__).parents[2] / "results"


def result(evaluation, tokens=5e6, device="a GPU"):
    """The part of a driver's file that is drawn."""
    training = {"tokens": tokens, "tokens_per_second": 1234.5, "minutes": 7.25, "peak_bytes": 3 * 2**30}
    return {
        "seed": 0,
        "parameters": 1000,
        "versions": {"device": device},
        "recipe": {"seq_len": 64},
        "training": training,
        "evaluation": evaluation,
    }


def perplexity(*bits_of_documents):
    """Two lengths of windows, two bins; the longer windows are 0.5 bits better."""
    by_document = {"documents": [f"d{i}" for i in range(len(bits_of_documents))], "position": [1.0, 2.0]}
    found = {"documents": len(bits_of_documents)}
    for length, less in ((64, 0.0), (256, 0.5)):
        bits_D = [bits - less for bits in bits_of_documents]
        rows = [[bits - 0.25, bits + 0.25] for bits in bits_D]
        found[str(length)] = {
            "bits_per_byte": float(np.mean(bits_D)),
            "by_document": {**by_document, "bits_per_byte": rows},
        }
    return found


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


def test_difference_is_paired_by_document():
    curve = {"documents": ["a", "b", "c"], "position": [1.0, 2.0], "bits_per_byte": [[1, 2], [3, 4], [9, 8]]}
    better = {**curve, "bits_per_byte": [[0.5, 1], [2.5, 2], [8.5, 5]]}
    found = difference(better, curve)
    assert found["bits_per_byte"] == pytest.approx([-0.5, -2])
    assert found["standard_error"] == pytest.approx([0, 1 / math.sqrt(3)])
    with pytest.raises(ValueError, match="different validation texts"):
        difference({**better, "documents": ["a", "b", "d"]}, curve)


def test_ablations_are_compared_with_the_published_choice_document_by_document(tmp_path):
    write_object(tmp_path / "ablation-unit.json", result(perplexity(1.0, 2.25, 3.5), tokens=6e6))
    ablations(tmp_path, tmp_path)
    assert cells((tmp_path / "ablations.md").read_text())[2][3:5] == ["-", "-"]  # there is no published choice yet
    write_object(tmp_path / "ablation-softplus.json", result(perplexity(1.5, 2.5, 3.5)))
    ablations(tmp_path, tmp_path)
    text = (tmp_path / "ablations.md").read_text()
    header, _, softplus, unit = cells(text)
    assert header[:2] == ["choice", "bits per byte, windows of 64"] and header[4] == "minus softplus, 256"
    assert softplus[:6] == ["softplus", "2.5000", "2.0000", "-", "-", "1,000"]
    error = f"{np.std([0.5, 0.25, 0], ddof=1) / math.sqrt(3):.4f}"
    assert unit[:5] == ["unit", "2.2500", "1.7500", *[f"-0.2500 ± {error}"] * 2]
    assert (softplus[6], unit[6], unit[9]) == ("5.0", "6.0", "3.0")  # M tokens, GiB
    assert "3 validation documents, the first 256 tokens" in text and "a GPU" in text
    write_object(tmp_path / "ablation-blocks.json", result(perplexity(1.5, 2.5)))
    with pytest.raises(ValueError, match="different validation texts"):
        ablations(tmp_path, tmp_path)


def needles(found, lengths=(32, 128), examples=4):
    """Scores of two tasks, in which so many of the examples are found at each of the lengths."""
    depths_NV = np.linspace(0, 1, examples)[:, None]
    scores = {
        length: NeedleScores((np.arange(examples) < right)[:, None], np.ones(examples, dtype=bool), depths_NV)
        for length, right in zip(lengths, found, strict=True)
    }
    tasks = [{"length": length, **score.to_dict()} for length, score in scores.items()]
    return {"data": ["a.txt"], "examples": examples, "tasks": {"single_1": tasks, "multikey_1": tasks[:1]}}


def drawn(folder):
    return {path.name for path in folder.glob("*.svg")}


def pictures(*kinds):
    """The figures of needles: all runs together, two tasks of them, and a map of each kind; each for two themes."""
    names = ("needle", "recall", *(f"needle-{kind}" for kind in kinds))
    return {f"{name}{theme}.svg" for name in names for theme in ("", "-dark")}


def test_needle_table_has_a_row_for_each_task_and_model(tmp_path):
    write_object(tmp_path / "needle-log_linear.json", result(needles((4, 2))))
    write_object(tmp_path / "needle-linear.json", result(needles((1, 0)), device="a CPU"))
    for name in ("log_linear-levels10", "log_linear-levels9"):
        write_object(tmp_path / f"needle-{name}.json", result(needles((0, 0))))
    needle(tmp_path, tmp_path)
    text = (tmp_path / "needle.md").read_text()
    table = cells(text)
    assert table[0] == ["values found, %", "32 tokens", "128 tokens"]
    assert table[2] == ["single_1, linear", f"25.0 ± {100 * math.sqrt(0.25 * 0.75 / 4):.1f}", "0.0 ± 0.0"]
    assert table[3] == ["single_1, log-linear", "100.0 ± 0.0", "50.0 ± 25.0"]
    assert [row[0] for row in table[4:6]] == ["single_1, log-linear-levels9", "single_1, log-linear-levels10"]
    assert [row[0] for row in table[6:8]] == ["multikey_1, linear", "multikey_1, log-linear"]
    assert [row[2] for row in table[6:8]] == ["-", "-"]
    assert "4 examples of every task and length, in a.txt" in text and "a CPU or a GPU" in text
    assert drawn(tmp_path) == pictures("linear", "log_linear", "log_linear-levels9", "log_linear-levels10")


def test_needle_table_and_figures_have_every_seed(tmp_path):
    for seed, found in ((10, (2, 1)), (0, (1, 0)), (2, (4, 1))):
        name = f"needle-linear-seed{seed}.json" if seed else "needle-linear.json"
        write_object(tmp_path / name, {**result(needles(found)), "seed": seed})
    write_object(tmp_path / "needle-log_linear-levels9-seed1.json", {**result(needles((4, 2))), "seed": 1})
    needle(tmp_path, tmp_path)
    table = cells((tmp_path / "needle.md").read_text())
    assert table[2] == ["single_1, linear", "58.3 (25.0, 100.0, 50.0)", "16.7 (0.0, 25.0, 25.0)"]
    assert table[3] == ["single_1, log-linear-levels9", "100.0 ± 0.0", "50.0 ± 25.0"]
    assert [row[:2] for row in table[-4:]] == [
        *(["linear", seed] for seed in ["0", "2", "10"]),
        ["log-linear-levels9", "1"],
    ]
    assert drawn(tmp_path) == pictures("linear", "log_linear-levels9")
    assert "linear Mamba-2, 3 seeds: values found by depth" in (tmp_path / "needle-linear.svg").read_text()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"recipe": {"seq_len": 32}}, "seq_len"),
        ({"data": {"train": {"fingerprint": "b"}}}, "training data"),
        ({"evaluation": {**needles((1, 0)), "data": ["b.txt"]}}, "evaluation data"),
        ({"evaluation": needles((1, 0), lengths=(32, 64))}, "tasks"),
        ({"evaluation": needles((1, 0), examples=5), "recipe": {"seq_len": 8}}, "seq_len, examples"),
    ],
)
def test_seeds_that_differ_in_more_are_not_averaged(tmp_path, other, named):
    write_object(tmp_path / "needle-linear.json", result(needles((1, 0))))
    write_object(tmp_path / "needle-linear-seed1.json", {**result(needles((1, 0))), "seed": 1, **other})
    with pytest.raises(
        ValueError, match=f"-seed1.json and .*needle-linear.json differ in more than the seed: in {named}$"
    ):
        needle(tmp_path, tmp_path)


def test_a_seed_counts_once(tmp_path):
    for name in ("linear", "linear-seed1"):
        write_object(tmp_path / f"needle-{name}.json", result(needles((1, 0))))
    with pytest.raises(ValueError, match="needle-linear.json: two are of the same seed"):
        needle(tmp_path, tmp_path)


def test_how_a_seed_was_run_does_not_matter(tmp_path):
    one = result(needles((1, 0)))
    write_object(tmp_path / "needle-linear.json", {**one, "recipe": {"seq_len": 64, "compile": True}})
    write_object(tmp_path / "needle-linear-seed1.json", {**one, "seed": 1})
    needle(tmp_path, tmp_path)
    assert "linear Mamba-2, 2 seeds" in (tmp_path / "needle-linear.svg").read_text()


def test_figures_are_the_same_bytes_each_time(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        speed(RESULTS, folder), memory(RESULTS, folder), draw_pictures(folder)
    assert drawn(first) == drawn(second) and "speed.svg" in drawn(first) and "buckets-dark.svg" in drawn(first)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in drawn(first))


def test_mqar_tables_keep_ours_the_papers_and_other_choices_apart(tmp_path):
    mqar(tmp_path, tmp_path)
    assert list(tmp_path.iterdir()) == []
    models = {"mamba2": 0.25, "log_linear_mamba2": 0.5, "log_linear_mamba2_unit": 0.75}
    results = [result_of(tiny_cell(model=model), test=test) for model, test in models.items()]
    results.append(result_of(tiny_cell(model="mamba2", dim=32, seed=1), test=0.125))
    results.append(result_of(tiny_cell(model="mamba2_states2"), test=0.375))
    write_object(tmp_path / "mqar.json", gather(results))
    mqar(tmp_path, tmp_path)
    ours, paper, choices = (tmp_path / "mqar.md").read_text().split("## ")[1:]
    rows = {(row[0], row[1]): row[4:7] for row in cells(ours)[2:]}
    assert rows == {
        ("16", "mamba2"): ["25.0", "-", "25.0"],
        ("16", "log_linear_mamba2"): ["50.0", "-", "50.0"],
        ("16", "mamba2_states2"): ["37.5", "-", "37.5"],
        ("32", "mamba2"): ["12.5", "-", "12.5"],
    }
    assert "paper" in paper.splitlines()[0] and "5 seeds" in paper.splitlines()[0]
    assert cells(paper)[3][:3] == ["32", "75.1 (4.9)", "76.5 (4.8)"]
    assert [row[1] for row in cells(choices)[2:]] == ["log_linear_mamba2_unit"]
    assert drawn(tmp_path) == {"mqar.svg", "mqar-dark.svg"}
    (tmp_path / "mqar.json").rename(tmp_path / "mqar-zoology.json")
    before = (tmp_path / "mqar.md").read_text()
    mqar(tmp_path, tmp_path)
    assert (tmp_path / "mqar-zoology.md").read_text() == before and len(drawn(tmp_path)) == 4


@pytest.mark.parametrize("finished", [False, True])
def test_mqar_tables_and_figures_have_rows_without_reported_seeds(tmp_path, finished):
    task = tiny_cell().task.override(protocol="zoology")
    models = ("mamba2", "log_linear_mamba2")
    results = [result_of(tiny_cell(model=model, task=task), test=0.5) for model in models]
    results += [result_of(tiny_cell(model="mamba2", task=task, seed=3), test=0.25)] * finished
    write_object(tmp_path / "mqar.json", gather(results))
    mqar(tmp_path, tmp_path)
    text = (tmp_path / "mqar.md").read_text()
    rows = {row[1]: row[4:7] for row in cells(text.split("## ")[1])[2:]}
    measured = ["25.0", "-", "25.0"] if finished else ["-"] * 3
    assert rows == {"mamba2": measured, "log_linear_mamba2": ["-"] * 3}
    assert f"Percent over {'1' if finished else 'no reported'} seeds" in text
    assert drawn(tmp_path) == ({"mqar.svg", "mqar-dark.svg"} if finished else set())


@pytest.mark.parametrize(
    ("linear", "equal", "title"),
    [
        ((0.4, 0.5), None, "Log-linear Mamba-2: above linear at 16, seeds overlap with linear at 32"),
        ((0.8, 0.9), None, "Log-linear Mamba-2: below linear at 16, seeds overlap with linear at 32"),
        ((0.4, 0.5), (0.65, 0.9), "Log-linear Mamba-2: seeds overlap with linear of equal bytes at 16"),
        (None, None, "Queries answered, by the bytes of the decode state"),
    ],
)
def test_the_title_of_the_recall_figure_says_whose_seeds_are_above(linear, equal, title):
    found = {("mamba2", 16): linear, ("mamba2_equal_bytes", 16): equal, ("log_linear_mamba2", 16): (0.6, 0.7)}
    if linear:
        found |= {("mamba2", 32): (0.1, 0.9), ("log_linear_mamba2", 32): (0.2, 0.3)}
    rows = [{"model": m, "dim": dim, "accuracies": list(seeds)} for (m, dim), seeds in found.items() if seeds]
    assert conclusion(rows) == title


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            dict(linear=(1, 0), log_linear=(4, 2)),
            "On average log-linear finds more needles in text than linear Mamba-2",
        ),
        (
            dict(linear=(1, 0), log_linear=(2, 1), linear_states4=(2, 2)),
            "and fewer than a linear model of four times the state",
        ),
        (
            dict(log_linear=(2, 1), linear_states4=(4, 1)),
            "On average log-linear finds fewer needles in text than a linear model of",
        ),
        (
            dict(linear=(4, 2), log_linear=(3, 2), linear_states4=(4, 2)),
            "On average log-linear finds fewer needles in text than linear Mamba-2",
        ),
        (dict(linear=(1, 2), log_linear=(4, 1)), "Values found by length"),
        (dict(linear=(1, 1), log_linear=(1, 1)), "Values found by length"),
    ],
)
def test_the_conclusion_of_needles_holds_at_every_length(tmp_path, found, expected):
    for kind, counts in found.items():
        scores = needles(counts)
        scores["tasks"] = {"single_2": scores["tasks"]["single_1"]}
        write_object(tmp_path / f"needle-{kind}.json", result(scores))
    needle(tmp_path, tmp_path)
    assert expected in (tmp_path / "recall.svg").read_text()

"""The table from known cells: the best learning rate is of the sweep, mean and deviation are over its seeds."""

import json
import math
from pathlib import Path

import pytest

from loglinear.evaluation.mqar import gather, markdown, read_results, rows_of
from loglinear.evaluation.mqar.cells import RecallCell
from loglinear.evaluation.mqar.folder import epochs_trained
from loglinear.evaluation.mqar.models import ALL_MODELS, MODELS
from loglinear.evaluation.mqar.table import best_learning_rate
from tests.evaluation.mqar.tiny import TASK, result_of, tiny_cell

RESULTS = [
    result_of(tiny_cell(learning_rate=1e-2, seed=0), test=0.5, validation=0.7),
    result_of(tiny_cell(learning_rate=3e-2, seed=0), test=0.9, validation=0.6),  # the test has no say
    result_of(tiny_cell(learning_rate=1e-2, seed=1), test=0.6, validation=0.1),
    result_of(tiny_cell(learning_rate=1e-2, seed=2), test=0.7, validation=0.1),
    result_of(tiny_cell(model="mamba2", dim=32), test=0.25),
]


def test_best_learning_rate_is_that_of_the_smallest_seeds_validation():
    assert best_learning_rate(RESULTS[:4]) == 1e-2
    equal = [result_of(tiny_cell(learning_rate=rate), test=1.0) for rate in (3e-2, 1e-3, 1e-2)]
    assert best_learning_rate(equal) == 1e-3  # of equals the smallest, whatever their order


def test_zoologys_rate_is_chosen_by_the_mean_of_three_seeds_and_others_are_reported():
    task = TASK.override(protocol="zoology")
    validation = {1e-2: (0.9, 0.1, 0.1), 3e-2: (0.5, 0.5, 0.5)}  # one seed alone would choose the first
    results = [
        result_of(tiny_cell(learning_rate=rate, seed=seed, task=task), test=0.9, validation=value)
        for rate, values in validation.items()
        for seed, value in enumerate(values)
    ]
    assert best_learning_rate(results) == 3e-2
    results += [result_of(tiny_cell(learning_rate=3e-2, seed=3 + i, task=task), test=0.2 * i) for i in range(3)]
    (row,) = gather(results)["table"]
    assert row["learning_rate"] == 3e-2 and row["seeds"] == [3, 4, 5]
    assert row["accuracies"] == pytest.approx([0, 0.2, 0.4]) and row["median"] == pytest.approx(0.2)


@pytest.mark.parametrize("rates", [(1e-2,), (1e-2, 3e-2)])
def test_tuning_seeds_are_not_reported_before_any_reported_seed(rates):
    task = TASK.override(protocol="zoology")
    results = [
        result_of(tiny_cell(learning_rate=rate, seed=seed, task=task), test=0.5) for rate in rates for seed in (0, 1, 2)
    ]
    table = json.loads(json.dumps(gather(results)))
    (row,) = table["table"]
    assert row["seeds"] == row["accuracies"] == [] and row["mean_by_pairs"] == {} and row["learning_rate"] == 1e-2
    assert row["median"] is row["mean"] is row["std"] is None and rows_of(table) == table["table"]
    assert markdown(table["table"]).splitlines()[2].split(" | ")[4:] == ["-", "-", "-", "0.01 |"]


def test_a_tuning_seed_is_reported_if_the_table_asked_for_it_and_chose_no_rate():
    task = TASK.override(protocol="zoology")
    results = [result_of(tiny_cell(learning_rate=1e-2, seed=seed, task=task), test=0.5) for seed in (0, 1)]
    table = json.loads(json.dumps(gather(results, seeds=(0,))))
    assert [row["seeds"] for row in rows_of(table)] == [row["seeds"] for row in table["table"]] == [[0]]
    results.append(result_of(tiny_cell(learning_rate=3e-2, seed=0, task=task), test=0.4))
    assert gather(results, seeds=(0,))["table"][0]["seeds"] == []


def test_a_smaller_seed_of_one_rate_does_not_choose_it():
    results = [
        result_of(tiny_cell(learning_rate=rate, seed=seed), test=0.5, validation=value)
        for rate, seed, value in ((1e-2, 1, 0.2), (3e-2, 1, 0.6), (1e-2, 0, 0.9), (1e-2, 2, 0.9), (3e-2, 2, 0.1))
    ]
    assert best_learning_rate(results) == 3e-2  # of seed 1, the smallest that tried both
    assert gather(results)["table"][0]["seeds"] == [1, 2]


def test_mean_and_sample_standard_deviation_over_seeds():
    mamba2, attention = gather(RESULTS)["table"]
    assert (attention["model"], attention["dim"], attention["learning_rate"]) == ("attention", 16, 1e-2)
    assert attention["seeds"] == [0, 1, 2]
    assert attention["mean"] == pytest.approx(0.6) and attention["std"] == pytest.approx(0.1)
    assert attention["mean_by_pairs"] == pytest.approx({"1": 0.7, "2": 0.5})
    assert (mamba2["mean"], mamba2["std"], mamba2["seeds"]) == (0.25, None, [0])


def test_markdown_has_a_row_for_each_dimension_and_model_with_every_seed_and_the_bytes():
    attention, linear = RecallCell.from_dict(RESULTS[0]["cell"]), RecallCell.from_dict(RESULTS[4]["cell"])
    kib = f"{2 * 2 * 8 * 16 * 4 / 1024:.1f} KiB"  # layers, keys and values, tokens, dimension, float32
    assert attention.decode_bytes == attention.cache_bytes and linear.cache_bytes == 2 * attention.cache_bytes
    own = f"{linear.decode_bytes / 1024:.1f} KiB"
    assert markdown(gather(RESULTS)["table"]).splitlines() == [
        "| dim | model | decode state | KV cache | median | range | each seed | learning rate |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| 16 | attention | {kib} | {kib} | 60.0 | 50.0 to 70.0 | 50.0, 60.0, 70.0 | 0.01 |",
        f"| 32 | mamba2 * | {own} | 4.0 KiB | 25.0 | - | 25.0 | 0.01 |",  # other rates may be better
    ]


def test_bytes_that_an_adapted_model_does_not_say_are_missing(monkeypatch):
    monkeypatch.setitem(ALL_MODELS, "adapted", MODELS["mamba2"]._replace(adapt=lambda model, length: None))
    rows = gather([result_of(tiny_cell(model="adapted"), test=0.5)])["table"]
    assert rows[0]["decode_bytes"] is None and "| 16 | adapted | - | 2.0 KiB | 50.0 |" in markdown(rows)


def test_rows_of_earlier_versions_get_the_columns_that_they_lack():
    table = json.loads(json.dumps(gather(RESULTS)))
    assert rows_of(table) == table["table"]
    for row in table["table"]:
        for name in ("decode_bytes", "cache_bytes", "median", "accuracies"):
            del row[name]
    assert rows_of(table) == gather(RESULTS)["table"]
    published = json.loads((Path(__file__).parents[3] / "results/mqar.json").read_text())
    rows = rows_of(published)
    assert [row["mean"] for row in rows] == [row["mean"] for row in published["table"]]
    assert {row["cache_bytes"] for row in rows} == {2 * 2 * 256 * dim * 4 for dim in (16, 32, 64)}


def test_gathered_json_has_every_cell_and_how_it_was_made_once():
    table = json.loads(json.dumps(gather(RESULTS)))
    assert len(table["cells"]) == 5 and table["cells"][1]["test_accuracy"] == 0.9
    assert table["task"] == json.loads(json.dumps(RESULTS[0]["cell"]["task"]))
    assert table["made"] == [
        {"precision": "float32", "versions": {"torch": "2"}, "command": ["loglinear", "eval", "mqar"]}
    ]
    assert math.isclose(sum(cell["seconds"] for cell in table["cells"]), 7.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "holds no cell"),
        (json.dumps({"cell": tiny_cell().to_dict()}), "is no result of a cell: it has no 'test_accuracy'"),
        (
            json.dumps(result_of(tiny_cell(), 0.5) | {"seconds": None}).replace('"seconds"', '"s"'),
            "it has no 'seconds'",
        ),
        (json.dumps({"cell": {**tiny_cell().to_dict(), "model": "mamba"}}), "holds no cell: unknown model 'mamba'"),
        (json.dumps(result_of(tiny_cell(task=TASK.override(epochs=2)), 0.5)), "made with epochs = 2, got 4"),
    ],
)
def test_damaged_and_foreign_files_are_named(tmp_path, text, message):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"a.json.*{message}"):
        read_results(tmp_path, TASK)


def test_epochs_of_unfinished_cells_are_counted_by_their_checkpoints(tmp_path):
    assert epochs_trained(tmp_path, TASK) == 0
    for name, steps in {"a": (1,), "b": (1, 2), "c": ()}.items():
        for step in steps:
            (tmp_path / "unfinished" / name / f"checkpoint-{step * TASK.steps_per_epoch}").mkdir(parents=True)
    assert epochs_trained(tmp_path, TASK) == 1.5

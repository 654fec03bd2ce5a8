"""The figure of routed reads beside linear models of equal bytes, from made-up cells."""

import pytest

from experiments.figures.equal_bytes import RESULT, equal_bytes, rows_of_cells, title_of
from loglinear.runs.json_files import write_object

KIB = {
    "mamba2": 10.0,
    "mamba2_states4": 40.0,
    "log_linear_mamba2": 45.0,
    "mamba2_r16-f16-gram": 160.0,
    "KV cache": 128.0,
}


def cell(model, seed, by_epoch, test=None):
    finished = {} if test is None else {"test_accuracy": test}
    which = {"model": model, "dim": 32, "learning_rate": 8e-3, "seed": seed}
    return {"cell": which, "finished": test is not None, "validation_accuracy_by_epoch": by_epoch, **finished}


def result(routed):
    cells = [
        cell("mamba2", 0, [0.9], 0.9),  # it chose the learning rate
        *(cell("mamba2", seed, [0.4], 0.5 + seed / 100) for seed in (3, 4, 5)),
        *(cell("mamba2_states4", seed, [0.8], 0.9) for seed in (3, 4)),
        *(cell("log_linear_mamba2", seed, [0.5], 0.6) for seed in (3, 4, 5)),
        cell("mamba2_r16-f16-gram", 3, [0.1, routed]),
        cell("mamba2_r16-f16-gram", 4, []),  # it did not reach a first epoch
    ]
    return {"decode_kib": {"32": KIB}, "cells": cells}


def test_rows_have_the_reported_seeds_and_say_what_is_unfinished():
    rows = {row["model"]: row for row in rows_of_cells(result(0.95))}
    assert rows["mamba2"]["accuracies"] == pytest.approx([0.53, 0.54, 0.55])
    assert rows["mamba2"]["median"] == pytest.approx(0.54)
    assert rows["mamba2"]["finished"] and rows["mamba2"]["decode_bytes"] == 10240
    assert rows["mamba2_r16-f16-gram"]["accuracies"] == [0.95]
    assert not rows["mamba2_r16-f16-gram"]["finished"]


@pytest.mark.parametrize(("routed", "behind"), [(0.95, 1), (0.9, 2), (0.7, 2)])
def test_the_title_counts_what_a_linear_model_of_as_many_bytes_equals(routed, behind):
    assert title_of(rows_of_cells(result(routed))).startswith(f"In {behind} of 2 cases")


def test_the_figure_is_drawn_in_both_themes(tmp_path):
    assert equal_bytes(tmp_path, tmp_path) == []
    write_object(tmp_path / RESULT, result(0.95))
    assert {file.name for file in equal_bytes(tmp_path, tmp_path)} == {"equal-bytes.svg", "equal-bytes-dark.svg"}
    drawn = (tmp_path / "equal-bytes.svg").read_text()
    assert "routed reads" in drawn and "size of the KV cache" in drawn and "Gated DeltaNet" not in drawn

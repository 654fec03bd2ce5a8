"""The table and the figures of long texts by context, from results that were made up."""

import numpy as np
import pytest

from experiments.figures.contexts import contexts
from experiments.recipes.long_text import long_text
from loglinear.runs.json_files import write_object
from tests.experiments.test_figures import cells, result

CONTEXTS = (1024, 4096, 8192, 16_384)


def written(folder, kind, seed, *changes_of_documents, fingerprint="a"):
    """Write a result whose documents take 2 bits per byte, changed by so much when the training length is given."""
    change_D = np.array(changes_of_documents)
    bits_CD = [2 + change_D * (context >= 8192) + 10 * (context > 8192) for context in CONTEXTS]
    found = {
        str(context): {"bits_per_byte": bits_D.mean(), "by_document": [*bits_D], "by_position": [bits_D.mean()] * 2}
        for context, bits_D in zip(CONTEXTS, bits_CD, strict=True)
    }
    names = [f"d{i}" for i in range(len(change_D))]
    text = {"fingerprint": fingerprint, "documents": names, "targets": 1234, "position": [9000.0, 15_000.0]}
    one = result({**text, "contexts": found})
    validation = [(600, 3.0), (1200, 2.5 + change_D.mean())]
    curve = [{"step": step, "split": "validation", "bits_per_byte": bits} for step, bits in validation]
    one["training"]["curve"] = [{"step": 900, "split": "train", "bits_per_byte": 9.0}, *curve]
    data = {"train": {"tokens": 2 * one["training"]["tokens"]}}
    name = f"long-text-8k-{kind}-seed{seed}.json" if seed else f"long-text-8k-{kind}.json"
    write_object(folder / name, {**one, "seed": seed, "recipe": long_text(kind).to_dict(), "data": data})


def test_the_table_has_every_seed_and_the_error_over_documents(tmp_path):
    for seed, change in enumerate((-0.25, -0.5, -0.75)):
        written(tmp_path, "transformer", seed, change - 0.1, change + 0.1)
    written(tmp_path, "linear", 0, 0.0, 0.0)
    drawn = contexts(tmp_path, tmp_path)
    text = (tmp_path / "long-text-8k.md").read_text()
    header, _, linear, transformer = cells(text.split("\n\n")[0])
    assert header[3:8] == [*(f"given {context:,} bytes" for context in CONTEXTS), "change from 1,024 to 8,192"]
    assert linear == ["linear", "1.63", "48.00", "2.0000", "2.0000", "2.0000", "12.0000", "+0.0000", "0.0000"]
    assert transformer[1:4] == ["48.00", "48.00", "2.0000 (2.0000, 2.0000, 2.0000)"]
    assert transformer[5] == "1.5000 (1.7500, 1.5000, 1.2500)"
    assert transformer[7:] == ["-0.5000 (-0.2500, -0.5000, -0.7500)", "0.1000"]
    assert "1,234 bytes of 2 validation documents" in text and "reads the training text 0.50 times" in text
    assert [row[:2] for row in cells(text)[-4:]] == [
        ["linear", "0"],
        *(["transformer", str(seed)] for seed in range(3)),
    ]
    parts = ("", "-positions", "-training")
    pictures = {f"long-text-8k{part}{theme}.svg" for part in parts for theme in ("", "-dark")}
    assert {path.name for path in drawn} == {"long-text-8k.md"} | pictures
    figures = [(tmp_path / f"long-text-8k{part}.svg").read_text() for part in parts]
    for figure in figures[:2]:
        assert "Given 8,192 bytes instead of 1,024, the loss of the transformer model changes by" in figure
        assert "-0.500 bits per byte, that of the other models by +0.000" in figure
    assert "In the last 600 of 1,200 steps the losses still fall by" in figures[2]
    assert "0.50 to 1.00 bits per byte" in figures[2]


def test_results_of_other_texts_are_not_compared(tmp_path):
    written(tmp_path, "linear", 0, 0.0)
    written(tmp_path, "hybrid", 0, 0.0, fingerprint="b")
    with pytest.raises(ValueError, match="different validation texts"):
        contexts(tmp_path, tmp_path)


def test_without_results_nothing_is_drawn(tmp_path):
    assert contexts(tmp_path, tmp_path) == [] and not list(tmp_path.iterdir())

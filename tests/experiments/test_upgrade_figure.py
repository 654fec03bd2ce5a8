"""The figure and table of an upgrade, of results that were made up here."""

import pytest

from experiments.figures.upgrade import conclusion, upgrade
from experiments.results import read_seeds, result_file
from experiments.upgrade import FOUND, KINDS, OWN
from loglinear.runs.json_files import write_object

LENGTHS = (32, 64)


def made_up(seed, found, bits=1.5, state_bytes=1 << 20, steps=500):
    """A result in which one task finds this share of the values at each length, and another half as much."""
    tasks = {
        task: [{"length": T, "accuracy": share * value} for T, value in zip(LENGTHS, found, strict=True)]
        for task, share in (("single_1", 1.0), ("multikey_1", 0.5))
    }
    training = {"tokens": 5e6, "tokens_per_second": 1234.5, "minutes": 7.25, "peak_bytes": 3 * 2**30, "steps": steps}
    perplexity = {} if bits is None else {"perplexity": {"bits_per_byte": bits}}
    return {
        "seed": seed,
        "parameters": 1000,
        "versions": {"device": "no GPU: made up"},
        "recipe": {"seq_len": 64},
        "training": training,
        "evaluation": {"data": ["a.txt"], "examples": 4, "state_bytes": state_bytes, "tasks": tasks, **perplexity},
    }


def write(folder, kind, *seeds, name=OWN, **options):
    for seed, found in enumerate(seeds):
        write_object(result_file(folder, f"{name}-{kind}", seed), made_up(seed, found, **options))


def title(folder):
    return conclusion(read_seeds(folder, "upgrade", KINDS))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "base", (0.7, 0.3), steps=6000)  # one for all seeds
    write(tmp_path, "linear", (0.8, 0.4), (1.0, 0.6))
    write(tmp_path, "levels_new", (0.8, 0.4), (0.9, 0.5), bits=None, state_bytes=4 << 20)
    write(tmp_path, "routed_all", (0.6, 0.8), (0.64, 1.0), state_bytes=16 << 20)
    return tmp_path


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


def test_the_table_has_means_and_every_seed(folder):
    files = upgrade(folder, folder)
    assert [file.name for file in files] == ["upgrade.md", "upgrade.svg", "upgrade-dark.svg"]
    text = (folder / "upgrade.md").read_text()
    rows = cells(text)
    assert rows[0] == ["values found, %", "32 tokens", "64 tokens", "bits per byte", "bytes of the decode state"]
    assert rows[2] == [
        "linear, before",
        "52.5",
        "22.5",
        "1.5000",
        "1,048,576",
    ]
    assert rows[4][0] == "levels, new weights trained" and rows[4][3:] == ["-", "4,194,304"]
    assert rows[5][1:3] == ["46.5 (45.0, 48.0)", "67.5 (60.0, 75.0)"]
    assert [row[-1] for row in rows[8:]] == ["1.00"] * 3 + ["4.00"] * 2 + ["16.00"] * 2
    assert [row[:2] for row in rows[8:11]] == [
        ["linear, before", "0"],
        ["linear, continued", "0"],
        ["linear, continued", "1"],
    ]
    assert (
        "the tasks single_1, multikey_1 of" in text
        and "4 examples of each and every length, in a.txt" in text
        and "one sequence of 64 tokens" in text
    )
    assert "trained for 6,000 steps, and each other one for 500 steps more" in text and "no GPU: made up" in text


def test_the_title_names_lengths_at_which_all_seeds_differ(folder):
    assert title(folder).splitlines() == [
        "routed, all weights trained: above linear at 64 tokens",
        "routed, all weights trained: below linear at 32 tokens (2 seeds)",
    ]
    upgrade(folder, folder)
    assert "below linear at 32 tokens (2 seeds)" in (folder / "upgrade.svg").read_text()


def test_the_title_says_if_no_upgrade_is_above_or_there_is_one_seed(folder):
    for file in folder.glob("upgrade-routed_all*"):
        file.unlink()
    assert title(folder) == "No upgrade finds more needles than linear after as many steps (2 seeds)"
    for file in folder.glob("*-seed1.json"):
        file.unlink()
    write(folder, "levels_all", (1.0, 0.5))
    assert title(folder) == "levels, all weights trained: above linear at all lengths (1 seed)"
    write(folder, "levels_all", (1.0, 0.4))
    assert title(folder) == "levels, all weights trained: above linear at 32 tokens (1 seed)"


def test_the_title_names_models_that_find_nothing(folder):
    write(folder, "base", (0.0, 0.0), steps=6000)
    write(folder, "routed_all", (0.6, 0.3), (0.64, 0.4))
    for kind in ("levels_new", "routed_new"):
        write(folder, kind, (0.0, 0.0), (0.0, 0.0))
    assert title(folder).splitlines() == [
        "No upgrade finds more needles than linear after as many steps (2 seeds)",
        "Nothing found: linear, before; levels, new weights; routed, new weights",
    ]


def test_unfinished_experiments_are_drawn(tmp_path):
    assert upgrade(tmp_path, tmp_path) == []
    write(tmp_path, "base", (0.6, 0.2))
    assert len(upgrade(tmp_path, tmp_path)) == 3
    write(tmp_path, "levels_new", (0.6, 0.2))
    assert title(tmp_path) == "Values found, before and after an upgrade"
    write(tmp_path, "linear", (0.6, 0.2))
    assert len(upgrade(tmp_path, tmp_path)) == 3


def test_models_that_found_needles_before_have_a_figure_of_their_own(folder):
    write(folder, "base", (0.9, 0.1), (0.9, 0.1), name=FOUND, steps=6000)
    write(folder, "linear", (0.9, 0.2), (0.9, 0.3), name=FOUND)
    write(folder, "levels_new", (0.9, 0.4), (0.9, 0.5), name=FOUND)
    files = upgrade(folder, folder)
    assert [file.name for file in files if file.suffix == ".md"] == ["upgrade.md", "upgrade-needle.md"]
    assert "above linear at 64 tokens (2 seeds)" in (folder / "upgrade-needle.svg").read_text()
    assert cells((folder / "upgrade-needle.md").read_text())[2][1:3] == ["67.5 (67.5, 67.5)", "7.5 (7.5, 7.5)"]

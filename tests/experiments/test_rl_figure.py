"""The figures of reinforcement learning, of results that were made up here."""

from experiments.figures.rl import LINES, conclusion, rl
from experiments.recipes.rl import TOKENS
from experiments.rl import read_runs
from tests.experiments.test_rl import write


def names(files):
    return [file.name for file in files if "dark" not in file.name]


def test_every_choice_of_tokens_has_a_look_of_its_own():
    looks = [(LINES[tokens].colour, LINES[tokens].marker) for tokens in TOKENS]
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == len(TOKENS)


def test_nothing_is_drawn_without_results(tmp_path):
    assert rl(tmp_path, tmp_path) == [] and not [*tmp_path.iterdir()]


def test_the_title_has_the_accuracy_of_each_choice_with_the_seeds(tmp_path):
    for seed, after in enumerate((0.5, 0.6, 0.7)):
        write(tmp_path, "log_linear", "top20", after, seed=seed)
    write(tmp_path, "log_linear", "lowest80", 0.2)
    write(tmp_path, "transformer", "all", 0.4)
    files = rl(tmp_path, tmp_path)
    assert names(files) == ["rl.md", "rl-log_linear.svg", "rl-transformer.svg"]
    assert len(files) == 5 and all(file.is_file() for file in files)
    runs = {tokens: seeds for (kind, tokens), seeds in read_runs(tmp_path).items() if kind == "log_linear"}
    title = conclusion("log_linear", runs).splitlines()
    assert title == [
        "log-linear Mamba-2: held-out problems solved, before and after the rounds",
        "top 20 % of the tokens: 25.0 % to 60.0 % (seeds 0, 1, 2)",
        "lowest 80 % of the tokens: 25.0 % to 20.0 % (seed 0)",
        "Their seeds differ, so this figure does not compare them.",
    ]
    drawn = {file.name: file.read_text() for file in files}
    assert all(line in drawn["rl-log_linear.svg"] for line in title)
    assert (
        "| linear" not in drawn["rl.md"]
        and "| log-linear | top 20 % | 0, 1, 2 | 25.0 ± 0.0 | 60.0 ± 10.0 |" in drawn["rl.md"]
    )


def test_choices_of_the_same_seeds_are_compared(tmp_path):
    for tokens in TOKENS:
        write(tmp_path, "linear", tokens, 0.5, seed=1)
    runs = {tokens: seeds for (_, tokens), seeds in read_runs(tmp_path).items()}
    title = conclusion("linear", runs).splitlines()
    assert len(title) == 1 + len(TOKENS) and title[2] == "all tokens: 25.0 % to 50.0 % (seed 1)"


def test_the_table_has_a_row_for_each_seed(tmp_path):
    write(tmp_path, "linear", "all", 0.75, seed=2)
    write(tmp_path, "linear", "all", 0.5)
    rl(tmp_path, tmp_path)
    _, runs = (tmp_path / "rl.md").read_text().split("\n\n")
    header, _, *rows = runs.splitlines()
    assert header.startswith("| kind | tokens | seed | sampled, before | sampled, after |")
    first = sum(1 / number for number in range(1, 11)) / 10  # of ten rounds the first ten are also the last ten
    shared = f"100.0 | 100.0 | 100.0 | 100.0 | 20.0 | 30.0 | {first:.3f} | {first:.3f} | 1.5 |"
    assert rows == [
        f"| linear | all | 0 | 25.0 | 50.0 | 35.0 | 60.0 | {shared}",
        f"| linear | all | 2 | 25.0 | 75.0 | 35.0 | 85.0 | {shared}",
    ]

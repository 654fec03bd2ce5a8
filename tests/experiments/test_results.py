"""The results of long texts and ablations in results/ are of the recipes here: one line makes any again."""

import json
import re
from pathlib import Path

import pytest

from experiments.ablations import CHOICES, ablation
from experiments.recipes.comparison import KINDS
from experiments.results import SEED
from experiments.runs import kind_recipe

OF_A_RUN = ("seed", "compile", "tokenizer")  # what a command says
LATER = {
    **dict.fromkeys(("start", "jitter", "new_only", "dtype")),
    "checkpointing": False,
}  # what no recipe had when they were made
RESULTS = Path(__file__).parents[2] / "results"
MEASURED = [
    kind for kind in KINDS if kind not in ("routed", "selective", "linear_states4", "log_linear_states4", "jittered")
]  # on long texts, in the earlier round
RUNS = {
    **{f"long-text-{kind}": kind_recipe("long_text", kind, miniature=False) for kind in MEASURED},
    **{f"ablation-{choice}": ablation(choice) for choice in CHOICES},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_result_is_of_the_recipe_that_its_name_says(name: str) -> None:
    expected = json.loads(json.dumps(RUNS[name].to_dict()))
    files = [RESULTS / f"{name}.json", *RESULTS.glob(f"{name}-seed*.json")]
    for file in files:
        made = {**LATER, **json.loads(file.read_text())["recipe"]}
        assert {**made, **{of: expected[of] for of in OF_A_RUN}} == expected, file


@pytest.mark.parametrize("experiment", ["needle", "long_text_8k"])
def test_results_of_small_models_are_of_the_recipe_and_of_three_seeds(experiment: str) -> None:
    """Results of a kind may be missing. None is of another recipe."""
    stem = experiment.replace("_", "-")
    files = sorted(RESULTS.glob(f"{stem}-*.json"))
    for kind in KINDS:
        own = [file for file in files if re.fullmatch(rf"{stem}-{kind}{SEED}", file.stem)]
        expected = json.loads(json.dumps(kind_recipe(experiment, kind, miniature=False).to_dict()))
        made = [json.loads(file.read_text())["recipe"] for file in own]
        assert sorted(recipe["seed"] for recipe in made) in ([], [0, 1, 2])
        for recipe in made:
            assert {**LATER, **recipe, **{of: expected[of] for of in OF_A_RUN}} == expected
        files = [file for file in files if file not in own]
    assert not files

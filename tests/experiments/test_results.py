"""The results of long texts and ablations in results/ are of the recipes here: one line makes any again."""

import json
from pathlib import Path

import pytest

from experiments.ablations import CHOICES, ablation
from experiments.recipes.comparison import KINDS
from experiments.runs import kind_recipe

OF_A_RUN = ("seed", "compile", "tokenizer")  # what a command says
LATER = dict.fromkeys(("start", "jitter", "new_only"))  # what no recipe had when they were made
RESULTS = Path(__file__).parents[2] / "results"
MEASURED = [kind for kind in KINDS if kind not in ("routed", "linear_states4")]
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


def test_results_of_needles_are_of_one_recipe() -> None:
    """It is an earlier one, whose revision docs/results/needles.md names."""
    made = [json.loads(file.read_text())["recipe"] for file in RESULTS.glob("needle-*.json")]
    of_a_kind = ("name", "summary", "model", *OF_A_RUN)
    recipes = [{name: value for name, value in recipe.items() if name not in of_a_kind} for recipe in made]
    assert len(made) >= len(MEASURED)
    assert all(recipe == recipes[0] for recipe in recipes)

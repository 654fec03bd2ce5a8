"""The results of long texts, needles and ablations in results/ are of the recipes here: one line makes any again."""

import json
from pathlib import Path

import pytest

from experiments.ablations import CHOICES, ablation
from experiments.recipes.comparison import KINDS
from experiments.runs import kind_recipe

OF_A_RUN = ("seed", "compile", "tokenizer")  # what a command says
LATER = dict.fromkeys(("start", "jitter", "new_only"))  # what no recipe had when they were made
RESULTS = Path(__file__).parents[2] / "results"
MEASURED = [kind for kind in KINDS if kind != "routed"]
RUNS = {
    **{f"long-text-{kind}": kind_recipe("long_text", kind, miniature=False) for kind in MEASURED},
    **{f"needle-{kind}": kind_recipe("needle", kind, miniature=False) for kind in MEASURED},
    **{f"ablation-{choice}": ablation(choice) for choice in CHOICES},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_result_is_of_the_recipe_that_its_name_says(name: str) -> None:
    expected = json.loads(json.dumps(RUNS[name].to_dict()))
    files = [RESULTS / f"{name}.json", *RESULTS.glob(f"{name}-seed*.json")]
    for file in files:
        made = {**LATER, **json.loads(file.read_text())["recipe"]}
        assert {**made, **{of: expected[of] for of in OF_A_RUN}} == expected, file

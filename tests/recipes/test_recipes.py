import json

import pytest

from loglinear.models import parameter_counts
from loglinear.recipes import RECIPES, TrainingRecipe, get_recipe

PARAMETERS = {  # millions
    "demo": (1, 2),
    "small": (20, 30),
    "paper_mamba2": (700, 826),
    "paper_gated_delta_net": (700, 825),
    "paper_transformer": (690, 825),
}


def test_recipes_are_those_of_users():
    assert set(RECIPES) == set(PARAMETERS)


@pytest.mark.parametrize("name", RECIPES)
def test_parameter_count_is_what_the_name_promises(name):
    low, high = PARAMETERS[name]
    assert low <= parameter_counts(get_recipe(name).model_config()).total / 1e6 <= high


@pytest.mark.parametrize(("name", "limit"), [("paper_mamba2", 0.03), ("paper_gated_delta_net", 0.004)])
def test_lambda_share_at_the_papers_sizes(name, limit):
    assert 0 < parameter_counts(get_recipe(name).model_config()).lambda_share < limit


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_survives_json(name):
    recipe = get_recipe(name)
    assert TrainingRecipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_linear_twin_differs_in_levels_alone():
    recipe = get_recipe("demo")
    twin = recipe.override(num_levels=1)
    assert parameter_counts(twin.model_config()).level_scales == 0
    assert twin.override(num_levels=recipe.model["num_levels"]) == recipe


def test_overrides_change_only_what_is_given():
    recipe = get_recipe("small")
    assert recipe.override(seed=None, data=None) == recipe
    changed = recipe.override(variant="gated_delta_net", steps=20, seq_len=4096, batch_tokens=4096, learning_rate=1e-4)
    assert changed.model["variant"] == "gated_delta_net"
    assert (changed.steps, changed.warmup_steps, changed.row_tokens, changed.learning_rate) == (20, 2, 4096, 1e-4)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="unknown recipe 'smal': did you mean 'small'. There are demo, "):
        get_recipe("smal")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and at most 1, got nan"),
        ({"micro_batch_tokens": 1024}, "micro_batch_tokens must be at least seq_len = 2048, got 1024"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, got 'float16'"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"batch_tokens": 100, "micro_batch_tokens": 64}, "micro_batch_tokens must divide batch_tokens"),
    ],
)
def test_impossible_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        get_recipe("demo").override(**change)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_as_listed_or_says_what_to_give(name):
    recipe = get_recipe(name)
    assert recipe.missing == {"demo": [], "small": ["data"]}.get(name, ["tokenizer", "data"])
    if recipe.missing:
        with pytest.raises(ValueError, match=f"recipe '{name}' names no .*data: give ") as caught:
            recipe.require_complete()
        assert all(f"--{option} (" in str(caught.value) for option in recipe.missing)
    recipe.override(data=("stdlib",), tokenizer="bytes").require_complete()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1.5}, "learning_rate must be positive and at most 1, got 1.5"),
        ({"batch_tokens": 2**31}, "batch_tokens must be at most 2147483647, got 2147483648"),
    ],
)
def test_numbers_are_bounded(change, message):
    with pytest.raises(ValueError, match=message):
        get_recipe("demo").override(**change)

import json

import pytest

from loglinear.models import LogLinearConfig, parameter_counts
from loglinear.recipes import RECIPES, TrainingRecipe, get_recipe, needs, require_ready
from loglinear.recipes.comparison import KINDS, model_of_kind
from loglinear.recipes.long_text import long_text
from loglinear.recipes.needle import needle

PARAMETERS = {  # millions
    "demo": (1, 2),
    "small": (20, 30),
    "paper_mamba2": (700, 826),
    "paper_gated_delta_net": (700, 825),
    "paper_transformer": (690, 825),
}
PARAMETERS |= {f"needle_{kind}": (11.5, 12.5) for kind in KINDS} | {f"long_text_{kind}": (13.1, 13.5) for kind in KINDS}


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


@pytest.mark.parametrize(("layers", "hybrid"), [(1, 1), (8, 1), (10, 2)])
def test_kinds_of_model_differ_in_their_past_and_not_in_their_size(layers, hybrid):
    base = {**get_recipe("needle_log_linear").model, "num_hidden_layers": layers}
    models = {kind: LogLinearConfig(**model_of_kind(kind, base)) for kind in KINDS}
    totals = {kind: parameter_counts(config).total for kind, config in models.items()}
    assert max(totals.values()) / min(totals.values()) < 1.03
    assert totals["log_linear"] == parameter_counts(LogLinearConfig(**base)).total
    full = {kind: config.layer_types.count("full_attention") for kind, config in models.items()}
    assert full == {"linear": 0, "log_linear": 0, "capped": 0, "routed": 0, "hybrid": hybrid, "transformer": layers}
    assert [models[kind].num_levels for kind in ("linear", "capped", "log_linear", "hybrid")] == [1, 11, 13, 13]
    routed = models["routed"]
    assert routed.routing == "gram" and routed.num_levels == routed.partition.num_columns(29 * 256)


@pytest.mark.parametrize("experiment", [long_text, needle])
def test_miniatures_are_small_and_of_one_size(experiment):
    recipes = [experiment(kind, miniature=True) for kind in KINDS]
    totals = [parameter_counts(recipe.model_config()).total for recipe in recipes]
    assert min(totals) > 2e5 and max(totals) < 8e5 and max(totals) / min(totals) < 1.03
    trained = [{**recipe.to_dict(), "name": None, "summary": None, "model": None} for recipe in recipes]
    assert trained[1:] == trained[:-1] and trained[0]["steps"] == 120


def test_needle_documents_are_read_whole():
    recipe = get_recipe("needle_linear")
    assert int(recipe.data[0].split(":")[2]) / 3 <= recipe.seq_len  # a token has 3.2 bytes of them


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="unknown recipe 'smal': did you mean 'small'"):
        get_recipe("smal")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and at most 1, got nan"),
        ({"micro_batch_tokens": 1024}, "micro_batch_tokens must be at least seq_len = 2048, got 1024"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"batch_tokens": 100, "micro_batch_tokens": 64}, "micro_batch_tokens must divide batch_tokens"),
    ],
)
def test_impossible_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        get_recipe("demo").override(**change)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_as_listed_or_says_what_it_needs_first(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = get_recipe(name)
    first = needs(recipe)
    assert (first == "") == (name == "demo")
    if first:
        with pytest.raises(ValueError) as caught:
            require_ready(recipe)
        assert all(part in str(caught.value) for part in first.split(" --"))
    for path in (recipe.tokenizer, *recipe.data):
        if path and "/" in path:
            (tmp_path / path).mkdir(parents=True)
    require_ready(recipe.override(data=recipe.data or ("stdlib",), tokenizer=recipe.tokenizer or "bytes"))


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

"""The recipes of long texts and needles: seven models of one size, one training, and the folders of earlier runs."""

import json

import pytest
import torch

from experiments.recipes.comparison import KINDS, model_of_kind
from experiments.recipes.long_text import long_text, long_text_16k
from experiments.recipes.needle import needle
from experiments.runs import EXPERIMENTS, kind_recipe, recipe_of_run
from loglinear.fenwick import num_levels
from loglinear.models import LogLinearConfig, LogLinearForCausalLM, parameter_counts
from loglinear.models.size import state_bytes
from loglinear.recipes import TrainingRecipe
from loglinear.runs.folder import run_recipe, write_run
from loglinear.training import train

MILLIONS = {needle: (6.0, 6.3), long_text: (5.1, 5.3), long_text_16k: (13.1, 13.5)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("experiment", MILLIONS)
def test_a_recipe_has_the_size_that_it_promises_and_survives_json(experiment, kind):
    recipe = experiment(kind)
    low, high = MILLIONS[experiment]
    assert low <= parameter_counts(recipe.model_config()).total / 1e6 <= high
    assert TrainingRecipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(("layers", "hybrid"), [(1, 1), (8, 1), (10, 2)])
def test_kinds_of_model_differ_in_their_past_and_not_in_their_size(layers, hybrid):
    base = {**needle("log_linear").model, "num_hidden_layers": layers}
    models = {kind: LogLinearConfig(**model_of_kind(kind, base)) for kind in KINDS}
    totals = {kind: parameter_counts(config).total for kind, config in models.items()}
    assert max(totals.values()) / min(totals.values()) < 1.03
    assert totals["log_linear"] == parameter_counts(LogLinearConfig(**base)).total
    full = {kind: config.layer_types.count("full_attention") for kind, config in models.items()}
    assert full == {**dict.fromkeys(KINDS, 0), "hybrid": hybrid, "transformer": layers}
    linear, wide, published = (state_bytes(models[k], 10_000) for k in ("linear", "linear_states4", "log_linear"))
    assert 2 * linear < wide < published  # a chunk's keys and values are part of the state
    assert [models[kind].num_levels for kind in ("linear", "capped", "log_linear", "hybrid")] == [1, 10, 12, 12]
    assert models["jittered"].num_levels == num_levels(8 * 2048)
    routed = models["routed"]
    assert routed.routing == "gram" and routed.num_levels == routed.partition.num_columns(8 * 2048)


@pytest.mark.parametrize("experiment", [long_text, long_text_16k, needle])
def test_miniatures_are_small_and_of_one_size(experiment):
    recipes = [experiment(kind, miniature=True) for kind in KINDS]
    totals = [parameter_counts(recipe.model_config()).total for recipe in recipes]
    assert min(totals) > 2e5 and max(totals) < 8e5 and max(totals) / min(totals) < 1.03
    jittered = {kind: recipe.jitter for kind, recipe in zip(KINDS, recipes, strict=True) if recipe.jitter}
    assert jittered == dict.fromkeys(("jittered", "routed", "selective"), 7 * recipes[0].seq_len)
    own = dict.fromkeys(("name", "summary", "model", "learning_rate", "jitter"))
    trained = [{**recipe.to_dict(), **own} for recipe in recipes]
    assert trained[1:] == trained[:-1] and trained[0]["steps"] == 120


def test_the_first_block_of_the_transformer_adds_less_than_its_embeddings():
    """With embeddings of 0.02 it added twice as much: that noise hid the tokens, and training hardly advanced."""
    torch.manual_seed(0)
    model = LogLinearForCausalLM(needle("transformer").model_config()).eval()
    with torch.no_grad():
        states = model(torch.randint(4096, (1, 256)), output_hidden_states=True, use_cache=False).hidden_states
    assert (states[1] - states[0]).norm() < 0.5 * states[0].norm()


def test_small_models_of_long_texts_are_trained_as_those_of_needles_and_read_no_text_twice():
    for kind in KINDS:
        texts, needles = (experiment(kind).to_dict() for experiment in (long_text, needle))
        same = ("learning_rate", "batch_tokens", "micro_batch_tokens", "warmup_steps", "weight_decay")
        expected = [needles[name] for name in same]
        earlier = {"linear": 2e-3, "routed": 4e-3, "selective": 4e-3}  # the needles' rates were found later
        expected[0] = earlier.get(kind, expected[0])
        assert [texts[name] for name in same] == expected
        assert texts["model"]["embedding_range"] == needles["model"]["embedding_range"] == 0.08
        assert 50e6 < texts["steps"] * texts["batch_tokens"] < 193e6  # bytes of the training text


def test_needle_documents_are_read_whole():
    recipe = needle("linear")
    assert int(recipe.data[0].split(":")[2]) / 3 <= recipe.seq_len  # a token has 3.2 bytes of them


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_folder_of_an_earlier_run_is_read_by_the_name_in_it(experiment, tmp_path, monkeypatch):
    """run.json holds the whole recipe: no list of names is asked. Without its data the run says which file it wants."""
    recipe = kind_recipe(experiment, "hybrid", miniature=False)
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", recipe, {}, parameters=1, model=recipe.model_config())
    assert run_recipe(tmp_path / "run") == recipe_of_run(recipe, tmp_path / "run") == recipe
    monkeypatch.chdir(tmp_path)
    wanted = "data/needle/tokenizer" if experiment == "needle" else "data/long_text/train.jsonl.zst"
    with pytest.raises(ValueError, match=wanted) as caught:
        train(recipe, tmp_path / "run", resume=True)
    assert "\n" not in str(caught.value)

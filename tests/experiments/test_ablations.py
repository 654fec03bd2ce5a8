"""The choices of the log-linear model: what each changes."""

import pytest

from experiments import ablations
from experiments.ablations import CHOICES, DEFAULT, ablation
from experiments.recipes.long_text import long_text_16k


@pytest.mark.parametrize("miniature", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_changes_one_thing_of_the_model_and_nothing_of_its_training(choice, miniature):
    recipe, default = (ablation(of, miniature=miniature) for of in (choice, DEFAULT))
    configs = [of.model_config().to_dict() for of in (recipe, default)]
    changed = [name for name in configs[0] if configs[0][name] != configs[1][name]]
    one = {"bounded": "lambda_form", "unit": "lambda_form", "capped": "num_levels", "blocks": "finest_block"}
    assert changed == [one[name] for name in (choice,) if name != DEFAULT]
    assert configs[0]["num_levels"] <= configs[1]["num_levels"]
    trained = [{**of.to_dict(), "name": None, "model": None} for of in (recipe, default)]
    assert trained[0] == trained[1]


def test_the_default_choice_is_the_published_model():
    config = ablation(DEFAULT).model_config()
    assert (config.lambda_form, config.finest_block, config.num_levels) == ("softplus", 1, 15)
    longer = long_text_16k("log_linear")
    assert (ablation(DEFAULT).seq_len, ablation(DEFAULT).data) == (longer.seq_len, longer.data)


def test_unknown_choice_and_missing_data_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="choice must be one of softplus, bounded, unit, capped, blocks, got 'hard'"):
        ablations.run("hard", tmp_path / "run")
    with pytest.raises(ValueError, match="train.jsonl.zst: run `python -m experiments.long_text prepare`"):
        ablations.run("unit", tmp_path / "run", data=tmp_path)

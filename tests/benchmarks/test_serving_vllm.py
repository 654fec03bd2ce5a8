"""The models that are compared inside of vLLM."""

import pytest

from benchmarks.serving_vllm import transformer_of
from loglinear.models import parameter_counts
from loglinear.recipes import get_recipe


def test_the_transformer_has_as_many_parameters():
    config = get_recipe("demo").model_config()
    other = transformer_of(config)
    assert set(other.layer_types) == {"full_attention"}
    assert parameter_counts(other).total == pytest.approx(parameter_counts(config).total, rel=0.01)

import pytest
import torch

from loglinear.training.train import train
from tests.training.tiny import tiny_recipe, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    """A trained tiny model's folder."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "run"
    train(tiny_recipe(text), out, progress=False)
    return out

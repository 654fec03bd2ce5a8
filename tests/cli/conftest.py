import pytest

from tests.training.tiny import train_tiny, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    """A trained tiny model's folder."""
    return train_tiny(text, tmp_path_factory.mktemp("runs") / "run")

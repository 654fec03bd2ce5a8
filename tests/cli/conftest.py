import pytest

from tests.cli.server import served, tiny_model
from tests.training.tiny import train_tiny, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    """A trained tiny model's folder."""
    return train_tiny(text, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module", params=[4, 0], ids=["rows", "turns"])
def slots(request):
    """The rows of the server; 0: requests take turns."""
    return request.param


@pytest.fixture(scope="module")
def port(model, slots):
    """The port of a server of the tiny model."""
    with served(model, slots=slots) as port:
        yield port

"""Every example of the documents runs: the pages' blocks of Python, the snippets and the notebooks."""

import functools
import os
import runpy
from pathlib import Path
from unittest import mock

import pytest

from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.training import ByteTokenizer
from tests.cli.server import served, tiny_model
from tests.documents.pages import DOCS, PAGES, ROOT, raw_blocks

LISTINGS = runpy.run_path(str(DOCS / "listings.py"))
COMPLETE = ("README.md", "docs/getting-started.md")  # a newcomer copies these
GUIDES = [page for page in PAGES if page.startswith("docs/guides/")]
WITH_PYTHON = [page for page in (*COMPLETE, *GUIDES) if any(language == "python" for language, _ in raw_blocks(page))]
SNIPPETS = {path.read_text(): path.relative_to(DOCS).as_posix() for path in DOCS.glob("snippets/*.py")}
INCLUDED = {SNIPPETS[text] for page in WITH_PYTHON for _, text in raw_blocks(page) if text in SNIPPETS}
SCRIPTS = sorted(
    script
    for folder in ("snippets", "notebooks")
    for path in DOCS.glob(f"{folder}/*.py")
    if (script := path.relative_to(DOCS).as_posix()) not in INCLUDED
)


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    """No example writes into the repository, opens a window or leaves variables behind."""
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(os.environ, MPLBACKEND="agg"):
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("documents") / "checkpoint"
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_heads=2, key_dim=16, head_dim=16, num_levels=6)
    LogLinearForCausalLM(LogLinearConfig(vocab_size=264, **sizes)).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def server(monkeypatch):
    """The server that a guide's client looks for on port 8000."""
    import openai

    with served(tiny_model()) as port:
        monkeypatch.setattr(openai, "OpenAI", functools.partial(_client, openai.OpenAI, port))
        yield


def _client(make, port, base_url, **options):
    assert base_url == "http://localhost:8000/v1"
    return make(base_url=f"http://localhost:{port}/v1", **options)


def run(script: str) -> dict[str, object]:
    with mock.patch.dict(os.environ):
        return runpy.run_path(str(DOCS / script), run_name="__main__")


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_blocks_of_a_page_run_in_order(page, checkpoint, request):
    """Snippets run alone, other blocks go on from the names before them; a guide may use a checkpoint."""
    names: dict[str, object] = {"__name__": "example"}
    if page not in COMPLETE:
        names["checkpoint"] = str(checkpoint)
    if "localhost:8000" in (ROOT / page).read_text():
        request.getfixturevalue("server")
    for number, (language, text) in enumerate(raw_blocks(page), 1):
        if text in SNIPPETS:
            names |= run(SNIPPETS[text])
        elif language == "python":
            exec(compile(text, f"{page}, block {number}", "exec"), names)
    if page == "README.md":
        assert names["out"].shape == (1, 1000, 4, 64) and names["level_scales"].grad is not None
        assert names["state"].position.tolist() == [1000] and names["tokens_out"].shape == (2, 30)


@pytest.mark.parametrize("script", SCRIPTS)
def test_notebooks_and_other_snippets_run(script):
    assert run(script)


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_listings_are_what_their_files_say(page):
    text = (ROOT / page).read_text()
    assert LISTINGS["updated"](text) == text, f"{page}: `python docs/listings.py` copies its listings again"

"""Sentences and docstrings begin with what they are about."""

import ast
import re

import pytest

from tests.documents.pages import PAGES, ROOT, inline, prose

SENTENCES = ("What", "Of", "That", "Whether", "Those")
DOCSTRINGS = ("What", "Whether", "Of", "Which", "Where", "How")
FOLDERS = ("loglinear", "benchmarks", "experiments", "examples", "docs", "tests")
READ = [page for page in PAGES if page == "README.md" or page.startswith("docs/") and "lab-notes" not in page]


@pytest.mark.parametrize("page", READ)
def test_sentences_have_a_subject(page):
    for kind, children in inline(page):
        if kind == "heading_open":
            continue
        for sentence in re.split(r"(?<=[.!?:])\s+", prose(children).strip()):
            assert not sentence.startswith(tuple(f"{word} " for word in SENTENCES)), f"{page}: {sentence}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_say_what_a_function_returns_or_does(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    wrong = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                words = (ast.get_docstring(node) or "").split()
                if words and re.split(r"\W", words[0])[0] in DOCSTRINGS:
                    wrong.append(f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {' '.join(words[:8])}")
    assert not wrong, "\n".join(wrong)

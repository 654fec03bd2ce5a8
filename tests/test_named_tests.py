"""Every test that a page names exists, so that a promise cannot outlive its test."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"\b(tests/[\w/]+\.py)(?:::(\w+))?")
PAGES = [path for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]) if NAMED.search(path.read_text())]


def functions(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tests_that_a_page_names_exist(page):
    for name, function in NAMED.findall(page.read_text()):
        assert (ROOT / name).is_file(), name
        assert not function or function in functions(ROOT / name), f"{name}::{function}"

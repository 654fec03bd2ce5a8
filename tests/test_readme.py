"""The README stays true: its first example runs, its files exist, its table names every variant."""

import re
from pathlib import Path

import pytest

from loglinear.variants import VARIANTS

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/performance.md", "docs/memory.md", "docs/demo.md"]


def test_the_ten_lines_run():
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(examples[0], names)
    assert names["out"].shape == (1, 1, 4, 64) and names["scales"].grad is not None
    assert names["state"].position.tolist() == [1001]
    exec(examples[1], names)
    assert names["out"].shape == (1, 4, 64) and names["state"].fenwick.position.tolist() == [1003]
    exec(examples[2], names)
    assert names["out"].shape == (1, 1000, 4, 64) and names["out"].isfinite().all()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    for link in links:
        assert link.startswith("http") or ((ROOT / page).parent / link).exists(), link


def test_the_table_names_every_variant():
    readme = (ROOT / "README.md").read_text()
    assert all(f"| `{name}` |" in readme for name in VARIANTS)

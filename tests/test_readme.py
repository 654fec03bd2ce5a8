"""The README stays true: its first example runs, its files exist, its table names every variant."""

import re
from pathlib import Path

import pytest

from loglinear.variants import VARIANTS

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_the_ten_lines_run():
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(examples[0], names)
    assert names["out"].shape == (1, 1000, 4, 64) and names["level_scales"].grad is not None
    assert names["state"].position.tolist() == [1000]
    exec(examples[1], names)
    assert names["text"].shape == (2, 30)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        assert link.startswith("http") or ((ROOT / page).parent / link).exists(), link


def test_the_table_names_every_variant():
    readme = (ROOT / "README.md").read_text()
    assert all(f"| `{name}` |" in readme for name in VARIANTS)

"""The README stays short, and the table of variants has each of them."""

import re

from loglinear.variants import VARIANTS
from tests.documents.pages import ROOT, inline, prose

LINES, NUMBERS = 110, 60


def test_the_readme_is_read_in_two_minutes():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= LINES, f"{len(lines)} lines: move something to a page of docs/"
    words = "\n".join(prose(children) for _, children in inline("README.md"))
    words = re.sub(r"arXiv \d{4}\.\d{5}", "arXiv", words)
    numbers = re.findall(r"(?<![\w.])\d+(?:[.,]\d+)*", words)  # in prose and tables; the 2 of mamba2 is none
    assert 0 < len(numbers) <= NUMBERS, (
        f"{len(numbers)} numbers: a third one in a sentence belongs into a table of docs/"
    )


def test_the_table_names_every_variant():
    page = (ROOT / "docs" / "reference" / "variants.md").read_text()
    assert all(f"| `{name}` |" in page for name in VARIANTS)

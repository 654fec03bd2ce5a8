"""The listings in the pages, copied from the files that they show: `python docs/listings.py`.

A listing is a block of Python below the comment `<!-- listing: PATH -->`, or `<!-- listing: PATH:SECTION -->` for the
lines between `# [SECTION]` and `# [end]` of a file. The copies make the pages readable without the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

DOCS = Path(__file__).parent
LISTING = re.compile(r"(?<=^)<!-- listing: ([\w./]+?)(?::(\w+))? -->\n```python\n.*?^```$", re.DOTALL | re.MULTILINE)


def updated(page: str) -> str:
    """Return a page's text with the code of every listing as its file has it."""
    return LISTING.sub(_listing, page)


def _listing(match: re.Match[str]) -> str:
    path, section = match.groups()
    code = (DOCS.parent / path).read_text()
    if section is not None:
        code = dedent(code.partition(f"# [{section}]\n")[2].rpartition("\n")[0].partition("    # [end]")[0])
    if not code.strip():
        raise ValueError(f"listing {path} has no section {section}")
    name = path if section is None else f"{path}:{section}"
    return f"<!-- listing: {name} -->\n```python\n{code.rstrip()}\n```"


if __name__ == "__main__":
    for page in sorted(DOCS.glob("**/*.md")):
        page.write_text(updated(page.read_text()))

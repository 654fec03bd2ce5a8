"""Every link of every page leads to a file of the repository, and to a heading where it names one."""

import re

import pytest

from tests.documents.pages import DOCS, PAGES, ROOT, inline, prose, tokens

THEMES = ("only-light", "only-dark")  # the site shows one of two pictures


def anchors(page: str) -> set[str]:
    """The names under which the site and GitHub know a page's headings."""
    titles = [prose(children).lower() for kind, children in inline(page) if kind == "heading_open"]
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip()) for title in titles}


def links(page: str) -> list[str]:
    """Targets of links and pictures, in Markdown and in HTML."""
    children = [token for _, found in inline(page) for token in found]
    html = [token.content for token in [*tokens(page), *children] if token.type in ("html_block", "html_inline")]
    targets = [str(token.attrs[name]) for token in children for name in ("href", "src") if name in token.attrs]
    return targets + re.findall(r'(?:src|srcset|href)="([^"]+)"', "\n".join(html))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"https?:|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert target.exists(), f"{page} links to {link}: there is no such file"
        assert target.is_relative_to(ROOT), f"{page} links to {link}, outside the repository"
        if page.startswith("docs/"):
            assert target.is_relative_to(DOCS), f"{page} links to {link}, which the site does not have"
        if anchor and anchor not in THEMES:
            assert anchor in anchors(target.relative_to(ROOT).as_posix()), f"{page} links to {link}: no such heading"

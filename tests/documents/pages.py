"""The repository's Markdown pages, taken apart: prose, links, blocks of code and command lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.glob("**/*.md")
    if not any(part.startswith(".") or part in ("runs", "site", "build") for part in path.relative_to(ROOT).parts)
)
PARSER = MarkdownIt("commonmark").enable("table")


def tokens(page: str) -> list[Token]:
    """The page's blocks; text that tabs (===) and admonitions (!!!) indent stands as if it were not indented."""
    lines, inside = [], False
    for line in (ROOT / page).read_text().split("\n"):
        inside = line.startswith(("=== ", "!!! ", "??? ")) or (inside and (not line or line.startswith("    ")))
        lines.append(line.removeprefix("    ") if inside else line)
    return PARSER.parse("\n".join(lines))


def inline(page: str) -> Iterator[tuple[str, list[Token]]]:
    """The kind of each block of prose (paragraph_open, heading_open, td_open, ...) and its inline tokens."""
    found = tokens(page)
    for before, token in zip(found, found[1:], strict=False):
        if token.type == "inline":
            yield before.type, token.children or []


def prose(children: list[Token]) -> str:
    """The words of a block, a code span as the letter x."""
    words = {"text": lambda t: t.content, "code_inline": lambda t: "x", "softbreak": lambda t: " "}
    return "".join(words[t.type](t) for t in children if t.type in words)


def raw_blocks(page: str) -> list[tuple[str, str]]:
    """The language of each block of code ("" if none is named) and its text."""
    return [(t.info.strip(), t.content) for t in tokens(page) if t.type in ("fence", "code_block")]


def command_lines(page: str) -> list[str]:
    """The commands of the project in the page's blocks of code, without variables and comments."""
    blocks = (text.replace("\\\n", " ") for language, text in raw_blocks(page) if language in ("", "bash", "sh"))
    return _commands(line for block in blocks for line in block.splitlines())


def mentioned_commands(page: str) -> list[str]:
    """The commands of the project in the page's sentences and tables."""
    return _commands(t.content for _, children in inline(page) for t in children if t.type == "code_inline")


def _commands(lines: Iterable[str]) -> list[str]:
    return [command for line in lines for part in line.split(" | ") if (command := _command(part))]


def _command(line: str) -> str:
    """The line as a command of the project, or ""."""
    line = re.split(r"\s+#|\s{2,}\(", line.strip())[0]
    line = re.sub(r"^(?:[A-Z_]+=\S+\s+)+", "", line).removeprefix(".venv/bin/")
    line = re.sub(r"^(?:torchrun|accelerate launch) .*?-m loglinear ", "loglinear ", line)
    is_pattern = re.search(r"\[OPTIONS\]|COMMAND", line)
    return " ".join(line.split()) if re.match(r"(loglinear|python -m|make|pytest) ", line) and not is_pattern else ""

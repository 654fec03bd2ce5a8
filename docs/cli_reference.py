"""The page docs/reference/cli.md, written from the commands themselves: `python docs/cli_reference.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from inspect import Parameter, cleandoc, signature
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer import Typer
from typer.models import ArgumentInfo

from loglinear.cli.app import app
from loglinear.cli.options import Routing, Server

PAGE = Path(__file__).parent / "reference" / "cli.md"
HEAD = """\
<!-- Generated from the commands. Do not edit it: `python docs/cli_reference.py` writes it again. -->

# Command line

`loglinear COMMAND --help` shows the same text in the terminal. Bad input ends with exit code 2 and one line that names
the mistake; `LOGLINEAR_TRACEBACK=1` shows the traceback behind it. Ctrl-C ends with exit code 130, SIGTERM with 143.
"""
KINDS = {Path: " PATH", str: " TEXT", int: " INTEGER", float: " NUMBER", bool: "", Routing: " TEXT", Server: " TEXT"}


def page() -> str:
    """Return the whole page."""
    found = list(commands(app, "loglinear"))
    overview = [f"| [`{name}`](#{name.replace(' ', '-')}) | {paragraphs(function)[0]} |" for name, function in found]
    sections = (line for name, function in found for line in section(name, function))
    return "\n".join([HEAD, "| command | purpose |", "|---|---|", *overview, "", *sections])


def commands(program: Typer, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the name and the function of every command, groups last."""
    for command in program.registered_commands:
        assert command.callback is not None
        yield f"{prefix} {command.callback.__name__}", command.callback
    for group in program.registered_groups:
        assert group.typer_instance is not None
        yield from commands(group.typer_instance, f"{prefix} {group.name}")


def paragraphs(function: Any) -> list[str]:
    """Return the paragraphs of a command's help, each on one line."""
    return [" ".join(part.split()) for part in cleandoc(function.__doc__).split("\n\n")]


def section(name: str, function: Any) -> list[str]:
    """Return the lines about one command: its purpose, usage, options and examples."""
    parts = paragraphs(function)
    text = [part for part in parts if not re.match(r"`.*`$|Examples?:$", part)]
    examples = [part.strip("`") for part in parts if re.match(r"`.*`$", part)]
    hints = get_type_hints(function, include_extras=True)
    given = [(p, *get_args(hints[p.name])) for p in signature(function).parameters.values() if get_args(hints[p.name])]
    required = [f"{option(*each)} " for each in given if each[0].default is Parameter.empty]
    rows = [f"| `{option(*each)}` | {each[2].help} | {default(*each)} |" for each in given]
    table = ["| option | meaning | default |", "|---|---|---|", *rows] if rows else []
    blocks = [[f"## {name}"], *([part] for part in text), [f"    {name} {''.join(required)}[OPTIONS]"], table]
    blocks += [["Examples:"], [f"    {call}" for call in examples]]
    return [line for block in blocks if block for line in (*block, "")]


def option(parameter: Parameter, kind: Any, info: Any) -> str:
    """Return an option as it is typed, with the kind of its value."""
    if isinstance(info, ArgumentInfo):
        return info.metavar or f"[{parameter.name.upper()}]..."
    names = info.default if isinstance(info.default, str) else f"--{parameter.name.replace('_', '-')}"
    return names.replace("/", " / ") + next(
        text for one, text in KINDS.items() if one.__name__ in re.findall(r"\w+", str(kind))
    )


def default(parameter: Parameter, kind: Any, info: Any) -> str:
    """Return the default that the terminal shows."""
    if parameter.default is Parameter.empty:
        return "required"
    if isinstance(info.show_default, str):
        return info.show_default
    value = getattr(parameter.default, "value", parameter.default)  # of an Enum
    return "" if value is None or value is False else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page())

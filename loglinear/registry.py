"""Choosing by name: one form of error for every registry."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

Entry = TypeVar("Entry")


def pick(what: str, registry: Mapping[str, Entry], name: str) -> Entry:
    """Return the entry called `name`.

    Raises ValueError if there is none: it says `what`, the name, the nearest one if any is near, and all of them.
    """
    if name in registry:
        return registry[name]
    nearest = get_close_matches(str(name), registry, n=1)
    hint = f"did you mean {nearest[0]!r}? There are" if nearest else "there are"
    raise ValueError(f"unknown {what} {name!r}: {hint} {', '.join(registry)}")

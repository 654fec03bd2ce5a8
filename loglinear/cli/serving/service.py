"""The options of `loglinear serve`, for either server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Service:
    """The address of a server, and its limits."""

    host: str = "localhost"
    port: int = 8000
    max_tokens: int = 4096
    """The most tokens of an answer."""
    max_prompt: int = 65_536
    """The most tokens of a prompt."""
    timeout: float = 120.0
    """The seconds of work after which an answer ends."""
    slots: int = 16
    """The requests that are answered at once. 0: one after the other."""
    prefix_cache: int = 256
    """The MiB of stored states."""

"""The published log-linear model, and models that differ from it in one choice."""

from typing import Any

PUBLISHED = {"lambda_form": "softplus"}  # with all levels, and a lambda for each from single tokens on


def choices(*, capped_levels: int) -> dict[str, dict[str, Any]]:
    """Return the configurations of log-linear models that differ from the published one in one thing.

    These are the two other forms of lambda, fewer levels, and one lambda for the tokens of a chunk of 64.
    """
    changes: dict[str, dict[str, Any]] = {
        "bounded": {"lambda_form": "bounded"},
        "unit": {"lambda_form": "unit"},
        "capped": {"num_levels": capped_levels},
        "blocks": {"finest_block": 64},
    }
    return {name: {**PUBLISHED, **change} for name, change in changes.items()}

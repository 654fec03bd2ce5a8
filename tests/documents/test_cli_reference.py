"""The page of the command line is what the commands say, and the defaults that their help shows are the real ones."""

import runpy
from inspect import signature
from typing import get_args, get_type_hints

import pytest

from loglinear.cli import app, eval_app
from loglinear.evaluation.membership import MAX_TOKENS, MIN_K
from loglinear.evaluation.mqar.cells import DIMS, RecallTask
from loglinear.recipes import get_recipe
from tests.documents.pages import DOCS

SCRIPT = DOCS / "cli_reference.py"


def test_the_page_is_up_to_date():
    script = runpy.run_path(str(SCRIPT))
    assert script["PAGE"].read_text() == script["page"](), "run: python docs/cli_reference.py"


def test_every_command_is_on_the_page():
    page = runpy.run_path(str(SCRIPT))["page"]()
    for name in (
        "train",
        "convert",
        "upgrade",
        "generate",
        "serve",
        "info",
        "demo",
        "tune",
        "eval perplexity",
        "eval entropy",
        "eval membership",
        "eval mqar",
        "bench ops",
    ):
        assert f"\n## loglinear {name}\n" in page
    assert "| `--compile / --no-compile` |" in page and "| `--temperature NUMBER` |" in page


DEMO, TASK = get_recipe("demo"), RecallTask()
SHOWN = [
    (app.demo, {"variant": DEMO.model["variant"], "steps": DEMO.steps, "seed": DEMO.seed}),
    (eval_app.mqar, {"examples": TASK.examples, "epochs": TASK.epochs, "protocol": TASK.protocol, "task": "standard"}),
    (eval_app.mqar, {"dim": ", ".join(map(str, DIMS))}),
]


@pytest.mark.parametrize(("command", "defaults"), SHOWN)
def test_defaults_that_a_function_decides_are_the_ones_shown(command, defaults):
    hints = get_type_hints(command, include_extras=True)
    for name, value in defaults.items():
        assert signature(command).parameters[name].default is None
        assert get_args(hints[name])[1].show_default == str(value), name


def test_defaults_of_membership_are_those_of_its_function():
    defaults = {name: parameter.default for name, parameter in signature(eval_app.membership).parameters.items()}
    assert (defaults["max_tokens"], defaults["min_k"]) == (MAX_TOKENS, MIN_K)

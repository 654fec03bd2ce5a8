"""The registration with transformers disturbs no program that does not use it."""

import subprocess
import sys
from types import ModuleType

import loglinear.autoload as autoload
from loglinear.autoload import AfterTransformers


def test_one_finder_waits_and_then_is_gone():
    code = (
        "import sys, loglinear, loglinear.autoload as a\n"
        "waiting = lambda: sum(isinstance(f, a.AfterTransformers) for f in sys.meta_path)\n"
        "a.start(); assert waiting() == 1 and 'transformers' not in sys.modules\n"
        "from transformers import CONFIG_MAPPING\n"
        "assert waiting() == 0 and 'loglinear_upgrade' in CONFIG_MAPPING\n"
        "assert 'loglinear.upgrades' not in sys.modules and 'loglinear.models' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_an_older_transformers_is_left_alone(monkeypatch):
    """`import transformers` must not fail because somebody uses our operators."""
    monkeypatch.setitem(sys.modules, "transformers.configuration_utils", ModuleType("older"))
    monkeypatch.delitem(sys.modules, "loglinear.autoload.configuration", raising=False)
    autoload.register()


def test_a_second_start_registers_again_without_a_finder():
    from transformers import CONFIG_MAPPING

    autoload.start()
    assert not any(isinstance(finder, AfterTransformers) for finder in sys.meta_path)
    assert "loglinear_upgrade" in CONFIG_MAPPING

"""The import rule of ARCHITECTURE.md, and what may be loaded when."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "loglinear"
ALLOWED = {
    "fenwick": set(),
    "signals": set(),
    "processes": set(),
    "registry": set(),
    "partition": {"fenwick"},
    "reference": {"partition", "fenwick"},
    "kernels": {"processes", "partition", "fenwick"},
    "ops": {"reference", "kernels", "partition", "fenwick"},
    "variants": {"ops", "registry", "fenwick"},
    "parallel": {"ops", "partition"},
    "layers": {"variants", "ops", "partition", "fenwick"},
    "inspection": {"layers", "partition"},
    "models": {"layers", "variants", "ops", "partition", "fenwick"},
    "serving": {"models", "layers", "ops"},
    "integrations": {"models", "layers", "variants"},
    "autoload": {"upgrades"},  # inside a function, once transformers loads an upgraded checkpoint
    "upgrades": {"autoload", "models", "layers", "variants", "ops", "partition", "fenwick"},
    "data": {"models"},
    "runs": {"autoload", "upgrades", "processes", "recipes", "data", "models", "layers"},
    "convert": {"autoload", "runs", "data", "models", "variants", "registry"},
    "training": {"upgrades", "signals", "processes", "runs", "recipes", "data", "models", "parallel"},
    "evaluation": {"signals", "processes", "training", "runs", "recipes", "data", "models", "registry", "partition"},
    "recipes": {"models", "registry"},
    "cli": {
        *("signals", "processes", "training", "evaluation", "convert", "runs", "recipes", "data"),
        *("serving", "upgrades", "models", "variants", "ops", "kernels", "fenwick"),
    },
}


MODULES = ("fenwick", "inspection", "partition", "processes", "registry", "signals")  # rooms of one file
CHECKED = ("loglinear.", "benchmarks.", "experiments.", "tests.")


def imported_names(path: Path, packages: set[str]) -> set[str]:
    """Return the modules of these packages that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} if node.module != "loglinear" else {f"loglinear.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] in packages}


def imported_rooms(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported_names(path, {"loglinear"}) if "." in name}


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_the_rule_allows(room):
    files = [PACKAGE / f"{room}.py"] if room in MODULES else sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        assert imported_rooms(path) - {room} <= ALLOWED[room] | {"__version__"}, path


def test_data_knows_models_by_their_tokenizer_alone():
    lines = [line for path in (PACKAGE / "data").rglob("*.py") for line in path.read_text().splitlines()]
    assert {line for line in lines if "loglinear.models" in line} == {"from loglinear.models import ByteTokenizer"}


def test_every_room_has_a_rule():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms <= set(ALLOWED)


def test_the_package_needs_no_other_folder_of_the_repository():
    for path in PACKAGE.rglob("*.py"):
        assert not imported_names(path, {"benchmarks", "docs", "examples", "experiments", "tests"}), path


@pytest.mark.parametrize("folder", ["loglinear", "benchmarks", "experiments", "examples", "tests"])
def test_modules_that_an_import_names_exist(folder):
    """Also inside functions, where nothing else notices a module that has moved: mypy ignores missing ones."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                ("loglinear.", "benchmarks.", "experiments.", "tests.")
            ):
                module = ROOT.joinpath(*node.module.split("."))
                assert module.is_dir() or module.with_suffix(".py").is_file(), f"{path}: {node.module}"


@pytest.mark.parametrize("module", ["loglinear", "loglinear.ops"])
def test_operators_need_torch_alone(module):
    heavy = {"triton", "transformers", "accelerate", "datasets"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_package_has_the_names_of_the_operators():
    """Each is what `loglinear.ops` has; a wrong one is named; `import loglinear` alone does not wait for torch."""
    code = (
        "import sys, loglinear; assert 'torch' not in sys.modules; from loglinear import *\n"
        "import loglinear.ops as ops\n"
        "assert all(getattr(ops, name) is globals()[name] for name in loglinear.__all__ if name != '__version__')\n"
        "assert {*loglinear.__all__, *ops.__all__} - {'IMPLEMENTATIONS'} <= set(dir(loglinear))\n"
        "assert isinstance(ops.IMPLEMENTATIONS, tuple)\n"
        "heavy = {'triton', 'transformers', 'accelerate', 'datasets'}\n"
        "assert not heavy & set(sys.modules); loglinear.log_linear"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stderr.strip().splitlines()[-1] == "AttributeError: module 'loglinear' has no attribute 'log_linear'"


@pytest.mark.parametrize("room", sorted({path.parent.name for path in PACKAGE.glob("*/__init__.py")}))
def test_public_names_are_no_helpers(room):
    """A room offers its users what they need, not what its own code shares."""
    module = importlib.import_module(f"loglinear.{room}")
    for name in getattr(module, "__all__", []):
        assert not name.startswith(("_", "check_", "of_")), name

"""Limits of files and signatures."""

import ast
import functools
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
FOLDERS = ("loglinear", "benchmarks", "experiments", "examples", "docs", "tests")
TEXTS = {path: path.read_text() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
LINES = 400
ARGUMENTS = 8
KERNEL_PARAMETERS = 28
FORMAT_SKIPS = 25  # for tables of numbers


class Function(NamedTuple):
    path: Path
    name: str
    decorators: str
    parameters: int

    @property
    def is_kernel(self) -> bool:
        return "triton.jit" in self.decorators

    @property
    def is_registered(self) -> bool:
        """The signature of a registered operator is its schema."""
        return "custom_op" in self.decorators or "register_fake" in self.decorators


@functools.cache
def functions() -> list[Function]:
    found = []
    for path, text in TEXTS.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                a = node.args
                count = len([*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))])
                decorators = " ".join(map(ast.unparse, node.decorator_list))
                found.append(Function(path, node.name, decorators, count))
    return found


def test_files_are_short():
    lengths = {path: len(text.splitlines()) for path, text in TEXTS.items()}
    assert lengths and not {path: length for path, length in lengths.items() if length > LINES}


def test_private_functions_take_few_arguments():
    """A private function is `_name`; `_` alone is the fake of a registered operator and has its signature."""
    private = [f for f in functions() if f.name.startswith("_") and f.name[1:2].isalpha()]
    assert private and not [f for f in private if f.parameters > ARGUMENTS]


def test_functions_that_launch_kernels_take_few_arguments():
    """They are private to the package, whatever their names."""
    folder = ROOT / "loglinear" / "kernels" / "triton"
    launching = [f for f in functions() if folder in f.path.parents and not f.is_kernel and not f.is_registered]
    assert launching and not [f for f in launching if f.parameters > ARGUMENTS]


def test_kernels_take_few_parameters():
    kernels = [f for f in functions() if f.is_kernel]
    assert kernels and not [f for f in kernels if f.parameters > KERNEL_PARAMETERS]


def test_few_lines_are_formatted_by_hand():
    assert 0 < sum(text.count("# fmt: " + "skip") for text in TEXTS.values()) <= FORMAT_SKIPS
    assert not [path for path, text in TEXTS.items() if "# fmt: " + "off" in text]  # a whole block, counted once

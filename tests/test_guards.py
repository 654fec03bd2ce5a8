"""Limits of files and signatures."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("loglinear", "benchmarks", "experiments", "tests")
TEXTS = {path: path.read_text() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
LINES = 400
ARGUMENTS = 8
KERNEL_PARAMETERS = 28
FORMAT_SKIPS = 25  # for tables of numbers


@functools.cache
def functions():
    """The name of every function, whether Triton compiles it, and the number of its parameters."""
    found = []
    for node in (node for text in TEXTS.values() for node in ast.walk(ast.parse(text))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            a = node.args
            count = len([*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))])
            found.append((node.name, any("triton.jit" in ast.unparse(d) for d in node.decorator_list), count))
    return found


def test_files_are_short():
    lengths = {path: len(text.splitlines()) for path, text in TEXTS.items()}
    assert lengths and not {path: length for path, length in lengths.items() if length > LINES}


def test_private_functions_take_few_arguments():
    """A private function is `_name`; `_` alone is the fake of a registered operator and has its signature."""
    private = [(name, count) for name, _, count in functions() if name.startswith("_") and name[1:2].isalpha()]
    assert private and not [function for function in private if function[1] > ARGUMENTS]


def test_kernels_take_few_parameters():
    kernels = [(name, count) for name, is_kernel, count in functions() if is_kernel]
    assert kernels and not [kernel for kernel in kernels if kernel[1] > KERNEL_PARAMETERS]


def test_few_lines_are_formatted_by_hand():
    skips = sum(text.count("# fmt: " + "skip") for text in TEXTS.values())
    assert 0 < skips <= FORMAT_SKIPS

"""ARCHITECTURE.md names modules that exist, in the folders that it draws, and every package."""

import re

from tests.documents.pages import ROOT

PAGE = (ROOT / "ARCHITECTURE.md").read_text()
TREE = PAGE.split("```")[1]
WRITTEN = {"loglinear_auto.py"}  # into each checkpoint


def drawn() -> tuple[set[str], set[str]]:
    """Return the folders and the modules of the tree, from the repository's root."""
    folders: list[tuple[int, str]] = []
    found, modules = set(), set()
    for line in TREE.strip().splitlines():
        indent, first = len(line) - len(line.lstrip()), line.split()[0]
        folders = [(depth, folder) for depth, folder in folders if depth < indent]
        if first.endswith("/"):
            folders.append((indent, first))
            found.add("".join(folder for _, folder in folders))
        modules |= {"".join(folder for _, folder in folders) + name for name in re.findall(r"\w+\.py", line)}
    return found, {module for module in modules if module.rpartition("/")[2] not in WRITTEN}


def test_drawn_folders_and_modules_exist():
    folders, modules = drawn()
    assert len(folders) > 20 and len(modules) > 60
    assert not [folder for folder in folders if not (ROOT / folder).is_dir()]
    assert not [module for module in modules if not (ROOT / module).is_file()]


def test_every_package_is_drawn():
    folders, _ = drawn()
    packages = {path.parent.relative_to(ROOT).as_posix() + "/" for path in (ROOT / "loglinear").rglob("__init__.py")}
    assert not [package for package in packages if not any(folder.startswith(package) for folder in folders)]


def test_files_in_the_text_exist():
    """A `*` stands for a folder."""
    text = PAGE.replace(TREE, "")
    names = set(re.findall(r"`([\w*/]+\.(?:py|json))`", text))
    assert len(names) > 10
    bases = ("", "loglinear/", "loglinear/kernels/triton/")
    assert not [name for name in names if not any(any(ROOT.glob(base + name)) for base in bases)]

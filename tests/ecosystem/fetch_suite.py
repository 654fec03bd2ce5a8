"""transformers' own model tests, out of the source distribution of the version that is installed."""

import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

CACHE = Path(__file__).parents[2] / ".peers"  # ignored by git
FILES = ("test_modeling_common.py", "test_configuration_common.py", "test_training_mixin.py")
# Modules that the files import and the distribution leaves out.
MISSING = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {'return_dict': False}\n",
}


class Unreachable(Exception):
    """The distribution cannot be had."""


def fetch() -> Path:
    """A folder with the package `transformers_suite`, downloaded on the first call. Raises Unreachable."""
    folder = CACHE / f"transformers-suite-{transformers.__version__}"
    package = folder / "transformers_suite"
    if not (folder / "whole").is_file():
        _unpack(_download(folder), package)
        for name, text in {**MISSING, "__init__.py": ""}.items():
            file = package / name
            file.parent.mkdir(parents=True, exist_ok=True)
            (file.parent / "__init__.py").touch()
            file.write_text(text)
        (folder / "whole").touch()
    return folder


def _download(folder: Path) -> Path:
    name = f"transformers=={transformers.__version__}"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--no-binary", ":all:"]
    result = subprocess.run([*pip, "--no-build-isolation", "--dest", str(folder), name], capture_output=True, text=True)
    if result.returncode != 0:
        raise Unreachable(f"pip could not download the source of {name}: {result.stderr.strip().splitlines()[-1]}")
    return next(folder.glob("transformers-*.tar.gz"))


def _unpack(archive: Path, package: Path) -> None:
    package.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as content:
        for member in content:
            path = Path(member.name)
            if path.parent.name == "tests" and path.name in FILES:
                file = content.extractfile(member)
                assert file is not None
                (package / path.name).write_bytes(file.read())
    archive.unlink()

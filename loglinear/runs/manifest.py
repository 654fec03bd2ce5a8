"""The manifest of a checkpoint: size and SHA-256 of every file, which show damage before anything is loaded.

manifest.json holds a checksum of itself and two objects. `files` lists the files of the checkpoint. `run` lists, for
each growing file of the run's folder, the part that existed when the checkpoint was saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from loglinear.runs.files import sync
from loglinear.runs.json_files import read_sealed, write_sealed

MANIFEST = "manifest.json"
BLOCK = 1 << 20  # bytes read at once


def write_manifest(folder: Path, beside: Iterable[Path] = ()) -> None:
    """Flush everything in a folder to the disk and write its manifest. `beside` lists growing files of the run.

    All files get the mode of a new file of this process, because safetensors makes them readable to the owner only.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for path in (*files.values(), *beside):
        sync(path)
    listed = {name: _stamp(path) for name, path in files.items() if name != MANIFEST}
    write_sealed(folder / MANIFEST, {"files": listed, "run": {path.name: _stamp(path) for path in beside}})
    mode = (folder / MANIFEST).stat().st_mode
    for path in files.values():
        path.chmod(mode)
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder, folder.parent):
        sync(path)


def damage(folder: Path, *, which: Callable[[str], bool], with_run: bool) -> str | None:
    """Return the first difference between a folder and its manifest, or None.

    `which` selects the names of files to compare; `with_run` adds the files of the run.
    """
    try:
        manifest = read_manifest(folder)
    except (ValueError, OSError) as error:
        return str(error)
    for name, stamp in manifest["files"].items():
        if which(name) and (problem := _difference(folder / name, stamp, whole=True)):
            return f"{name} {problem}"
    for name, stamp in manifest["run"].items() if with_run else ():
        if problem := _difference(folder.parent / name, stamp, whole=False):
            return f"the run's {name} {problem}"
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder. Raises ValueError if it is damaged, FileNotFoundError if there is none."""
    manifest = read_sealed(folder / MANIFEST)
    for part in ("files", "run"):
        if not isinstance(manifest.get(part), dict) or not all(map(_is_stamp, manifest[part].values())):
            raise ValueError(f"{folder / MANIFEST} is no manifest: its {part!r} does not list files")
    return manifest


def logged_bytes(folder: Path, name: str) -> int | None:
    """Return the size of a file of the run when the checkpoint was saved, or None without a manifest."""
    if not (folder / MANIFEST).exists():
        return None
    stamp = read_manifest(folder)["run"].get(name)
    return None if stamp is None else stamp["bytes"]


def _is_stamp(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("bytes"), int) and isinstance(value.get("sha256"), str)


def _stamp(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"bytes": size, "sha256": _sha256(path, size)}


def _difference(path: Path, stamp: dict[str, Any], *, whole: bool) -> str | None:
    """Return the difference as a predicate, or None. Without `whole` only the beginning of the file is compared."""
    expected = stamp["bytes"]
    try:
        if not path.is_file():  # reading a pipe would never end
            return "is missing"
        size = path.stat().st_size
        if size < expected:
            return f"is truncated: it has {size:,} bytes, expected {expected:,}"
        if whole and size > expected:
            return f"has {size:,} bytes, expected {expected:,}"
        if _sha256(path, expected) != stamp["sha256"]:
            return "is damaged: it differs from what was saved"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _sha256(path: Path, size: int) -> str:
    """Return the checksum of the first `size` bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (block := file.read(min(size, BLOCK))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()

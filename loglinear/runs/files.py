"""Files that appear whole or not at all: they are on the disk before they replace others, and errors name them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# torch's writer of archives reports a failed write as a RuntimeError that names its own source file and no cause.
TORCH_WRITER = ("inline_container.cc", "PytorchStreamWriter")


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step. A reader, a kill or a power cut sees the old text or the new one.

    Raises OSError, which names the file and the reason, if the file system refuses; the old text stays.
    """
    staged = staged_file(path)
    with writing(path):
        try:
            staged.write_text(text)
            sync(staged)
            staged.replace(path)
        except OSError:
            staged.unlink(missing_ok=True)
            raise
        sync(path.parent)


def staged_file(path: Path) -> Path:
    """Return the path of a file's new text before it replaces the file."""
    return path.with_name(f".{path.name}.new")


def sync(path: Path) -> None:
    """Wait until the contents of a file, or the names in a folder, are on the disk."""
    if os.name == "nt":  # Windows flushes neither folders nor files that are open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems flush no folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn every failure of writing into one OSError that names `path` and the reason.

    Python's error for a full disk has no file name. safetensors and torch do not raise OSError at all.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise OSError(f"{path} cannot be written: {reason}") from error


def _reason(error: BaseException | None) -> str | None:
    if isinstance(error, OSError):
        return error.strerror or _reason(error.__cause__)  # the cause, if the error has passed through `writing`
    if isinstance(error, SafetensorError):
        return str(error).rpartition("I/O error: ")[2].partition(" (os error")[0]
    if any(name in str(error) for name in TORCH_WRITER):
        return "a write failed, as on a full disk, over a quota or over the limit of a file's size"
    return None

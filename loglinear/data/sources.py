"""Sources of text: files, folders, globs, data sets, the standard library of this Python, and generated needles.

A document is a file, a line of a jsonl file, a row of a data set, or a generated text. Documents are never mixed: each
is wholly for training or wholly for validation, and packing keeps each as a sequence of its own.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import zstandard

from loglinear.data.needle_documents import SHORTEST, needle_documents, told_again

STDLIB = "stdlib"
DATASETS_PREFIX = "datasets:"
NEEDLE_PREFIX = "needle:"
NEVER_A_HAYSTACK = 0.1  # documents with a `name_hash` below it may validate, so they are never training haystacks
END_TOKENS = 2  # of a document: one at its beginning, one at its end
SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")  # files read from a folder, also with .zst or .gz appended
PACKED = (".zst", ".gz")
# Folders of the standard library that some installations lack, or that are not library code.
STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "ensurepip"}


def name_hash(name: str) -> float:
    """Return a document's fixed, arbitrary number in [0, 1). Below the validation fraction it validates."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


class Document(NamedTuple):
    """One text with a name that depends neither on the machine's folders nor on other documents.

    The name of a file is relative to the folder of the source, or to the part of a glob before its first wildcard.
    """

    name: str
    text: str
    learnt: tuple[tuple[int, int], ...] | None = None  # ranges of characters that count in the loss; None: all

    def encode(self) -> bytes:
        """Return the text in UTF-8. Raises ValueError, which names the document, for half of a surrogate pair."""
        try:
            return self.text.encode()
        except UnicodeEncodeError as error:  # JSON can hold one
            raise ValueError(f"document {self.name} is not text: character {error.start} is a lone surrogate") from None


def read_documents(sources: Iterable[str]) -> Iterator[Document]:
    """Yield all documents of all sources, in the same order on every machine.

    A source is one of these:

    - a file, a folder (its .txt .md .rst .py .jsonl files, each also as .zst or .gz) or a glob;
    - `stdlib`, the text of the standard library of this Python;
    - `datasets:NAME` or `datasets:NAME:CONFIG`, whose rows have a `text` column (needs the `datasets` extra);
    - `needle:COUNT:LENGTH`, generated documents of needles in noise (`loglinear.data.needle_documents`) of at most
      LENGTH byte tokens, the two at the ends included;
    - `needle:COUNT:LENGTH:SOURCE`, the same with half of the documents in the text of another source. A tenth of its
      documents may validate and is left out, if others remain.

    In generated documents the loss counts only repeated keys and values, and so all answers. Links to folders are
    followed.

    Raises ValueError for a source that is missing or holds no text. Raises it also for a file that is not text, and for
    a part that cannot be read or would be read twice.
    """
    for source in sources:
        count = 0
        for document in _read_source(source):
            if document.text:
                count += 1
                yield document
        if count == 0:
            raise ValueError(f"data {source!r} holds no text")


def _read_source(source: str) -> Iterator[Document]:
    if not source:
        raise ValueError("data must not be empty: '.' is the current folder")
    if source == "-":
        raise ValueError("data '-': standard input is not read; save it as a file and give the file's path")
    if "://" in source:
        raise ValueError(f"data {source!r}: URLs are not read; download the file and give its path")
    if source == STDLIB:
        yield from _read_stdlib()
    elif source.startswith(DATASETS_PREFIX):
        yield from _read_dataset(source)
    elif source.startswith(NEEDLE_PREFIX):
        yield from needles_of(source)
    else:
        yield from _read_paths(source)


def _read_paths(source: str) -> Iterator[Document]:
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in _walk(path) if _is_readable(file))
        if not files:
            raise ValueError(f"data folder {source!r} holds no {' '.join(SUFFIXES)} files (plain, .zst or .gz)")
        root = path
    elif path.is_file():
        files, root = [path], path.parent
    else:
        files = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not files:
            raise ValueError(
                f"data {source!r} is neither a file, a folder nor a glob that matches; expected a path, "
                f"'{STDLIB}', '{DATASETS_PREFIX}NAME' or '{NEEDLE_PREFIX}COUNT:LENGTH'"
            )
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
    for file in files:
        yield from _read_file(file, file.relative_to(root).as_posix())


def _walk(root: Path) -> Iterator[Path]:
    """Yield every file below a folder. Raises ValueError for an unreadable part, whose absence nobody would notice."""
    seen: dict[str, str] = {}
    for folder, subfolders, names in os.walk(root, onerror=_unreadable, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            raise ValueError(f"data folder {folder} is {seen[real]} again, through a link: remove one of them")
        seen[real] = folder
        subfolders.sort()
        yield from (Path(folder, name) for name in names)


def _unreadable(error: OSError) -> None:
    raise ValueError(f"data folder {error.filename} cannot be read: {error.strerror}") from error


def _is_readable(file: Path) -> bool:
    return _plain(file).suffix in SUFFIXES and (file.is_file() or file.is_symlink())


def _plain(file: Path) -> Path:
    """Return the file's name without the suffix of a compression."""
    return file.with_suffix("") if file.suffix in PACKED else file


def _read_file(file: Path, name: str) -> Iterator[Document]:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"data file {ascii(str(file))} has a name that is not UTF-8: rename it") from None
    text = _decode(file)
    if _plain(file).suffix == ".jsonl":
        yield from _read_jsonl(file, name, text)
    else:
        yield Document(name, text)


def _decode(file: Path) -> str:
    try:
        data = file.read_bytes()
        if file.suffix == ".zst":
            data = _decompress(data)
        elif file.suffix == ".gz":
            data = gzip.decompress(data)
    except zstandard.ZstdError as error:
        raise ValueError(f"data file {file} is not a whole zstd file: {error}") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"data file {file} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise ValueError(f"data file {file} cannot be read: {error.strerror}") from error
    if b"\0" in data:
        raise ValueError(f"data file {file} is binary, expected UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data file {file} is not UTF-8 text (byte {error.start})") from error


def _decompress(data: bytes) -> bytes:
    """Return all frames of a .zst file. Unlike zstandard's stream reader this notices a truncated frame."""
    parts = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        parts.append(frame.decompress(data))
        if not frame.eof:
            raise zstandard.ZstdError("it is truncated")
        data = frame.unused_data
    return b"".join(parts)


def _read_jsonl(file: Path, name: str, text: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # RecursionError: brackets nested a thousand deep
            raise ValueError(f"data file {file} line {number} is not JSON: {getattr(error, 'msg', error)}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f'data file {file} line {number} has no "text" string')
        yield Document(f"{name}:{number}", row["text"])


def _read_stdlib() -> Iterator[Document]:
    """Yield the sources of this Python's standard library, without its tests, and the topics of pydoc's help."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if STDLIB_SKIPPED.isdisjoint(parts) and parts[0] != "pydoc_data" and not parts[0].startswith("config-"):
            yield Document("/".join(parts), file.read_text(encoding="utf-8", errors="replace"))
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for topic in sorted(topics):
        yield Document(f"pydoc_data/{topic}", topics[topic])


def _read_dataset(source: str) -> Iterator[Document]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(f"data {source!r} needs the datasets package: pip install 'loglinear[datasets]'") from error
    name, _, config = source.removeprefix(DATASETS_PREFIX).partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split="train")
    except Exception as error:  # the library raises dozens of types, and all mean that nothing was loaded
        raise ValueError(f"data {source!r} could not be loaded: {error}") from error
    if "text" not in rows.column_names:
        raise ValueError(f"data {source!r} has no 'text' column, only {', '.join(rows.column_names)}")
    for number, text in enumerate(rows["text"]):
        if not isinstance(text, str):
            raise ValueError(f"data {source!r} row {number} must have a string as 'text', got {text!r}")
        yield Document(f"{name}:{number}", text)


def needle_count(source: str) -> int:
    """Return the number of documents of a source `needle:COUNT:LENGTH[:SOURCE]`; ValueError for any other text."""
    return _needle_parts(source)[0]


def _needle_parts(source: str) -> tuple[int, int, str]:
    """Return the count, the length and the source of the haystacks, which may be empty."""
    count, length, text = (source.removeprefix(NEEDLE_PREFIX).split(":", 2) + ["", ""])[:3]
    numbers = all(number.isascii() and number.isdecimal() and len(number) < 10 for number in (count, length))
    if not source.startswith(NEEDLE_PREFIX) or not numbers:
        raise ValueError(f"data {source!r} must be {NEEDLE_PREFIX}COUNT:LENGTH or {NEEDLE_PREFIX}COUNT:LENGTH:SOURCE")
    return int(count), int(length), text


def needles_of(source: str, numbers: range | None = None) -> Iterator[Document]:
    """Yield the documents of a source `needle:COUNT:LENGTH[:SOURCE]`, or those of consecutive `numbers` alone.

    Raises ValueError as `read_documents` does.
    """
    count, length, text = _needle_parts(source)
    documents = list(read_documents([text])) if text else []
    training = [document for document in documents if name_hash(document.name) >= NEVER_A_HAYSTACK]
    texts = [document.text for document in training or documents]
    if length < SHORTEST + END_TOKENS:
        raise ValueError(f"data {source!r} must have a LENGTH of at least {SHORTEST + END_TOKENS}")
    numbers = range(count) if numbers is None else numbers
    made = needle_documents(len(numbers), length - END_TOKENS, texts, first=numbers.start)
    for number, document in zip(numbers, made, strict=True):
        name = ":".join([f"{NEEDLE_PREFIX}{length}", *([text] if text else []), str(number)])
        yield Document(name, document, tuple(told_again(document)))

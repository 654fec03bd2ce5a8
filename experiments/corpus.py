"""Long documents from Debian packages: sources and manuals, the files of one directory joined to one text.

This code alone decides the selection, so equal versions of the packages give equal documents:

- A file has a suffix of `SUFFIXES`, is in a folder of `SOURCES` but not below `SKIPPED`, and is UTF-8 text.
- Generated files (`is_generated`), tables of numbers (`is_table`) and files that mostly repeat lines of earlier files
  (`NearDuplicates`) are left out.
- A document is the files of one directory, by name, each below a line `==> path <==`. A directory of more than 1 MiB
  becomes several documents of about the same size, cut between files. A document below 64 KiB is left out.
- The hash of a directory's path decides if it validates. Only its first document is used then, so that all validation
  documents come from different directories: standard errors assume that they are independent.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import subprocess
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import accumulate, groupby
from pathlib import Path, PurePosixPath
from typing import NamedTuple

SUFFIXES = {".c", ".cc", ".h", ".rs", ".go", ".el", ".py", ".rst", ".txt", ".md", ".pod"}
SKIPPED = "translations"  # in the kernel's documentation: the same text in other languages
SMALLEST, LARGEST = 64 * 1024, 1024 * 1024  # UTF-8 bytes of a document
VALIDATION_SHARE = 0.15  # of the directories
MOST_DIGITS = 0.12  # share of a text's characters without spaces: prose and code have about 0.02, register tables 0.2
SHORTEST_LINE = 24  # shorter lines are common and do not identify a file
GENERATED = re.compile(r"do not (edit|modify)|(auto(matically)?|machine|code)[- ]?generated", re.IGNORECASE)


class Source(NamedTuple):
    """Folders of one Debian package, or of an archive inside it, with everything below them."""

    package: str
    root: str
    folders: tuple[str, ...] = ()  # of the root; empty: all of them


SOURCES = (  # Debian 12
    Source("anarchism", "usr/share/doc/anarchism/markdown"),
    Source("debian-reference-en", "usr/share/debian-reference"),
    Source("jargon-text", "usr/share/doc/jargon-text"),
    Source("python3.11-doc", "usr/share/doc/python3.11/html/_sources"),
    Source("perl-doc", "usr/share/perl"),
    Source("vim-runtime", "usr/share/vim/vim90/doc"),
    Source(
        "emacs-el",
        "usr/share/emacs/28.2/lisp",
        ("calc", "calendar", "emacs-lisp", "eshell", "gnus", "mh-e", "net", "nxml", "org", "textmodes", "vc"),
    ),
    Source("golang-1.19-src", "usr/share/go-1.19/src"),
    Source("rust-src", "usr/src/rustc-1.63.0", ("compiler", "library/alloc", "library/core", "library/std")),
    Source("gcc-12-source", "gcc-12.2.0/gcc", ("analyzer", "c", "c-family", "cp", "d", "fortran")),
    Source(
        "linux-source-6.1",
        "linux-source-6.1",
        ("Documentation", "block", "fs", "io_uring", "kernel", "mm", "net", "security", "virt"),
    ),
)


class File(NamedTuple):
    """A text file, and its path below the root of its source."""

    path: str
    text: str


class LongDocument(NamedTuple):
    """The joined files of a directory, or a part of them."""

    name: str
    text: str
    validates: bool


def read_package(archive: Path, source: Source) -> list[File]:
    """Return the text files that `source` names in a .deb, by path."""
    process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process, tarfile.open(fileobj=process.stdout, mode="r|") as tar:
        return sorted(text_files(tar, source))


def text_files(tar: tarfile.TarFile, source: Source) -> Iterator[File]:
    """Yield the text files of an archive, and of a .tar.xz inside it, in order. Files in .gz are unpacked."""
    folders = tuple(f"{folder}/" for folder in source.folders)
    for member in tar:
        content = tar.extractfile(member) if member.isfile() else None
        if content is None:
            continue
        if member.name.endswith(".tar.xz"):  # packages of sources hold one archive
            with tarfile.open(fileobj=content, mode="r|xz") as nested:
                yield from text_files(nested, source)
            continue
        whole = member.name.removeprefix("./").removesuffix(".gz")
        path = whole.removeprefix(f"{source.root}/")
        if path == whole or not _is_wanted(PurePosixPath(path)) or (folders and not path.startswith(folders)):
            continue
        data = content.read()
        try:
            yield File(path, (gzip.decompress(data) if member.name.endswith(".gz") else data).decode())
        except UnicodeDecodeError:  # an old file in Latin-1
            continue


def _is_wanted(path: PurePosixPath) -> bool:
    return path.suffix in SUFFIXES and SKIPPED not in path.parts


def is_generated(text: str) -> bool:
    """Return True if the top of a file says that a program wrote it."""
    return GENERATED.search(text[:1000]) is not None


def is_table(text: str) -> bool:
    """Return True if digits are many, as in register headers, arrays of hexadecimal numbers and test vectors."""
    return sum(map(text.count, "0123456789")) > MOST_DIGITS * sum(map(len, text.split()))


class NearDuplicates:
    """A memory of the lines of all earlier files."""

    def __init__(self) -> None:
        self.seen: set[int] = set()  # checksums: a rare wrong one among a file's lines does not matter

    def has_most_of(self, text: str) -> bool:
        """Return True if earlier files had more than half of this file's longer lines. Otherwise remember the lines."""
        stripped = (line.strip() for line in text.split("\n"))
        lines = [zlib.crc32(line.encode()) for line in stripped if len(line) >= SHORTEST_LINE]
        if sum(line in self.seen for line in lines) > len(lines) / 2:
            return True
        self.seen.update(lines)
        return False


def long_documents(package: str, files: Iterable[File], duplicates: NearDuplicates) -> Iterator[LongDocument]:
    """Yield the documents of one package in the order of their paths."""
    by_directory = sorted(files, key=lambda file: (PurePosixPath(file.path).parent.as_posix(), file.path))
    kept = (
        file
        for file in by_directory
        if not (is_generated(file.text) or is_table(file.text) or duplicates.has_most_of(file.text))
    )
    for directory, members in groupby(kept, key=lambda file: PurePosixPath(file.path).parent.as_posix()):
        name = package if directory == "." else f"{package}/{directory}"
        held_out = validates(name)
        for part, text in enumerate(list(_join(members))[: 1 if held_out else None]):
            if len(text.encode()) >= SMALLEST:
                yield LongDocument(f"{name}:{part}", text, held_out)


def validates(directory: str) -> bool:
    """Return True if a directory is for validation, which depends on its name alone."""
    digest = hashlib.blake2b(directory.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < VALIDATION_SHARE * 2**64


def _join(files: Iterable[File]) -> Iterator[str]:
    """Yield the files end to end, in as many parts as LARGEST requires."""
    texts = [f"==> {file.path} <==\n\n{file.text.strip()}\n\n" for file in files]
    ends = list(accumulate(len(text.encode()) for text in texts))
    parts = -(-ends[-1] // LARGEST)
    starts = [0, *ends[:-1]]
    part_of = (start * parts // ends[-1] for start in starts)
    for _, members in groupby(zip(part_of, texts, strict=True), key=lambda member: member[0]):
        yield "".join(text for _, text in members)

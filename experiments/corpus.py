"""Long documents out of Debian packages: sources and manuals, the files of one directory joined to one text.

What is taken is decided by the code here alone, so equal versions of the packages give equal documents:

- Files with a suffix of `SUFFIXES` in the folders of `SOURCES`, but not below `SKIPPED`, that are UTF-8 text.
- Not what a program wrote (`is_generated`), nor tables of numbers (`is_table`), nor a file most of whose lines earlier
  files had (`NearDuplicates`).
- A document is the files of one directory, by name, each below a line `==> path <==`. A directory of more than 1 MiB
  becomes several documents of about the same size, cut between files; what stays below 64 KiB is left out.
- A directory validates where the hash of its path says so. Only its first document is taken then, so that those of the
  validation text come from different directories: standard errors take them for independent.
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
SKIPPED = "translations"  # of the kernel's documentation: the same text in other languages
SMALLEST, LARGEST = 64 * 1024, 1024 * 1024  # UTF-8 bytes of a document
VALIDATION_SHARE = 0.15  # of the directories
MOST_DIGITS = 0.12  # of a text's characters that are no spaces: prose and code have about 0.02, register tables 0.2
SHORTEST_LINE = 24  # shorter lines are the same everywhere, and do not tell where a file comes from
GENERATED = re.compile(r"do not (edit|modify)|(auto(matically)?|machine|code)[- ]?generated", re.IGNORECASE)


class Source(NamedTuple):
    """Folders of one Debian package, or of an archive inside it, with all that lies below them."""

    package: str
    root: str
    folders: tuple[str, ...] = ()  # of the root; none: all of them


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
    """The text files of a .deb that `source` names, by path."""
    process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process, tarfile.open(fileobj=process.stdout, mode="r|") as tar:
        return sorted(text_files(tar, source))


def text_files(tar: tarfile.TarFile, source: Source) -> Iterator[File]:
    """The text files of an archive, and of a .tar.xz inside it, in its order; what is .gz is unpacked."""
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
    """Whether a file says on top that a program wrote it."""
    return GENERATED.search(text[:1000]) is not None


def is_table(text: str) -> bool:
    """Whether digits are many: register headers, arrays of hexadecimal numbers, test vectors."""
    return sum(map(text.count, "0123456789")) > MOST_DIGITS * sum(map(len, text.split()))


class NearDuplicates:
    """Remembers the lines of the files it has seen."""

    def __init__(self) -> None:
        self.seen: set[int] = set()  # checksums: a rare wrong one among a file's lines does not matter

    def has_most_of(self, text: str) -> bool:
        """Whether earlier files had more than half of this one's longer lines; remembers them if not."""
        stripped = (line.strip() for line in text.split("\n"))
        lines = [zlib.crc32(line.encode()) for line in stripped if len(line) >= SHORTEST_LINE]
        if sum(line in self.seen for line in lines) > len(lines) / 2:
            return True
        self.seen.update(lines)
        return False


def long_documents(package: str, files: Iterable[File], duplicates: NearDuplicates) -> Iterator[LongDocument]:
    """The documents of one package's files, which are in the order of their paths."""
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
    """Whether a directory is of the validation text; depends on its name alone."""
    digest = hashlib.blake2b(directory.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < VALIDATION_SHARE * 2**64


def _join(files: Iterable[File]) -> Iterator[str]:
    """The files behind one another, in as many parts as LARGEST asks for."""
    texts = [f"==> {file.path} <==\n\n{file.text.strip()}\n\n" for file in files]
    ends = list(accumulate(len(text.encode()) for text in texts))
    parts = -(-ends[-1] // LARGEST)
    starts = [0, *ends[:-1]]
    part_of = (start * parts // ends[-1] for start in starts)
    for _, members in groupby(zip(part_of, texts, strict=True), key=lambda member: member[0]):
        yield "".join(text for _, text in members)

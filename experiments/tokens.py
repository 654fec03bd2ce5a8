"""Training text as tokens in a folder: made once, by all cores, and shared by all seeds and continued runs.

A text is a list of sources of `loglinear.data.sources` that are the same on every machine with one Python: `stdlib`,
and needles in it or in noise. Other code in `loglinear.data`, or another file of the tokenizer, makes another text.
Tokenising 300,000 documents of needles takes minutes on one core.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import loglinear.data
from experiments.locks import alone
from loglinear.data.corpus import Corpus, join, tokenize
from loglinear.data.sources import NEEDLE_PREFIX, STDLIB, needle_count, needles_of, read_documents
from loglinear.data.tokenizer import BYTES, load_tokenizer
from loglinear.processes import follow_parent

ARRAYS = ("tokens", "offsets_D", "bytes_D", "learnt")
DESCRIPTION = "description.json"
CODE = sorted(Path(loglinear.data.__file__).parent.glob("*.py"))
TOKENIZER_FILES = (".json", ".model", ".txt")
SHARE = 2000  # documents that a process makes at a time


class Share(NamedTuple):
    """A part of a source."""

    source: str
    numbers: range | None  # of the documents of needles; None: the whole source


def tokens_of(sources: Sequence[str], tokenizer: str, folder: Path, *, processes: int | None = None) -> Corpus:
    """Return the corpus of `read_corpus(sources, load_tokenizer(tokenizer))`, from `folder` if it holds it.

    Otherwise this many processes (default: one for each core) make it, and the folder keeps it. A line on stderr says
    if the folder held it. Programs that want the same text at once wait for the first one.

    Raises ValueError for a source that is a file, because files change.
    """
    for source in sources:
        text = source.split(":", 3)[3:] if source.startswith(NEEDLE_PREFIX) else [source]
        if text not in ([], [STDLIB]):
            raise ValueError(f"data {source!r} must be {STDLIB} or {NEEDLE_PREFIX}COUNT:LENGTH[:{STDLIB}] to be kept")
    described = {
        "sources": list(sources),
        "tokenizer": tokenizer if tokenizer == BYTES else _fingerprint(_tokenizer_files(tokenizer)),
        "code": _fingerprint(CODE),
        "python": platform.python_version(),
    }
    name = hashlib.blake2b(json.dumps(described).encode(), digest_size=8).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / f".{name}.lock"):
        if (folder / name).exists():
            print(f"training text: the tokens in {folder / name}, made before", file=sys.stderr)
        else:
            _save(_made(sources, tokenizer, processes), described, folder / name)
    return _load(folder / name)


def _fingerprint(files: Iterable[Path]) -> str:
    """Return a hash of the names and contents of files."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _tokenizer_files(folder: str) -> list[Path]:
    return sorted(file for file in Path(folder).iterdir() if file.suffix in TOKENIZER_FILES and file.is_file())


def _made(sources: Sequence[str], tokenizer: str, processes: int | None) -> Corpus:
    shares: list[Share] = []
    for source in sources:
        if source.startswith(NEEDLE_PREFIX):
            count = needle_count(source)
            starts = range(0, count, SHARE)
            shares += [Share(source, range(start, min(start + SHARE, count))) for start in starts]
        else:
            shares.append(Share(source, None))
    workers = min(processes or len(os.sched_getaffinity(0)), len(shares))
    if workers == 1:
        return join([_tokenized(share, tokenizer) for share in shares])
    spawn = multiprocessing.get_context("spawn")  # a fork would share the tokenizer's threads
    with ProcessPoolExecutor(workers, spawn, initializer=_begin_work) as pool:
        return join(list(pool.map(_tokenized, shares, [tokenizer] * len(shares))))


def _begin_work() -> None:
    follow_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _tokenized(share: Share, tokenizer: str) -> Corpus:
    source, numbers = share
    documents = read_documents([source]) if numbers is None else needles_of(source, numbers)
    return tokenize(documents, load_tokenizer(tokenizer))


def _save(corpus: Corpus, described: dict[str, Any], folder: Path) -> None:
    """Write a corpus to a folder, which appears whole."""
    staging = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        for name in ARRAYS:
            np.save(staging / f"{name}.npy", getattr(corpus, name))
        (staging / "names.json").write_text(json.dumps([corpus.names, corpus.special]))
        (staging / DESCRIPTION).write_text(json.dumps(described))
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _load(folder: Path) -> Corpus:
    names, special = json.loads((folder / "names.json").read_text())
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    return Corpus(names=tuple(names), special=tuple(special), **arrays)

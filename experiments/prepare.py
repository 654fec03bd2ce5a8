"""The long texts, from packages of Debian or in miniature: train.jsonl.zst, validation.jsonl.zst, statistics.json."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zstandard
from tqdm import tqdm

from experiments.corpus import LARGEST, SMALLEST, SOURCES, LongDocument, NearDuplicates, long_documents, read_package
from loglinear.data.sources import read_documents
from loglinear.runs.json_files import write_object

LEVEL = 22  # the highest of zstd
WINDOW = 27  # log2 bytes: the largest that a decompressor accepts by default
KIB = 1024
MINIATURE_BYTES, MINIATURE_SMALLEST = 4_000_000, 8 * KIB  # of all documents together, and of one
DOWNLOADS = ".packages-"  # prefix of the temporary folder of the packages


def prepare(out: Path) -> dict[str, Any]:
    """Download the packages, write the two texts and then statistics.json, whose presence means that they are whole.

    Returns the statistics. Raises ValueError if this is not Debian 12, or if packages cannot be downloaded.
    """
    _require_debian()
    out.mkdir(parents=True, exist_ok=True)
    documents: list[LongDocument] = []
    versions = {}
    for left in out.glob(f"{DOWNLOADS}*"):  # remains of an interrupted run
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=DOWNLOADS, dir=out) as folder:
        archives = _download(Path(folder))
        duplicates = NearDuplicates()
        for source in (bar := tqdm(SOURCES, unit="package")):
            bar.set_description(f"reading {source.package}")
            versions[source.package] = _output("dpkg-deb", "--field", str(archives[source.package]), "Version")
            files = read_package(archives[source.package], source)
            documents += long_documents(source.package, files, duplicates)
    return _write(out, documents, versions)


def _write(out: Path, documents: Sequence[LongDocument], versions: dict[str, str]) -> dict[str, Any]:
    """Write the two texts and then statistics.json, whose presence means that they are whole. Return the statistics."""
    parts = {
        "train": [document for document in documents if not document.validates],
        "validation": [document for document in documents if document.validates],
    }
    (out / "statistics.json").unlink(missing_ok=True)
    sizes = {name: write_documents(out / f"{name}.jsonl.zst", part) for name, part in parts.items()}
    statistics = {
        "packages": versions,
        "zstd": {"level": LEVEL, "window_log": WINDOW, "version": ".".join(map(str, zstandard.ZSTD_VERSION))},
        **{name: {**describe(part), "compressed_bytes": sizes[name]} for name, part in parts.items()},
    }
    write_object(out / "statistics.json", statistics)
    return statistics


def prepare_miniature(out: Path) -> dict[str, Any]:
    """Write both texts from long documents of Python's standard library, with no download. Return their statistics."""
    out.mkdir(parents=True, exist_ok=True)
    documents: list[LongDocument] = []
    room = MINIATURE_BYTES
    for document in read_documents(["stdlib"]):
        size = len(document.text.encode())
        if MINIATURE_SMALLEST <= size <= room:
            room -= size
            documents.append(LongDocument(document.name, document.text, len(documents) % 10 == 0))
    return _write(out, documents, {"python": platform.python_version()})


def _require_debian() -> None:
    try:
        system = platform.freedesktop_os_release()
    except OSError:
        system = {"PRETTY_NAME": platform.system()}
    if (system.get("ID"), system.get("VERSION_ID")) != ("debian", "12"):
        raise ValueError(
            f"the texts come from packages of Debian 12, and this is {system['PRETTY_NAME']}: prepare them on Debian 12"
        )


def _download(folder: Path) -> dict[str, Path]:
    packages = [source.package for source in SOURCES]
    print(f"downloading {len(packages)} packages, about 330 MB")
    _output("apt-get", "download", *packages, cwd=folder)
    return {package: next(folder.glob(f"{package}_*.deb")) for package in packages}


def _output(*command: str, cwd: Path | None = None) -> str:
    try:
        return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        raise ValueError(f"{command[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().rsplit("\n", 1)[-1]
        raise ValueError(f"{' '.join(command[:2])} failed (is `apt-get update` needed?): {reason}") from None


def write_documents(path: Path, documents: Sequence[LongDocument]) -> int:
    """Write a compressed JSON line {"name", "text"} for each document, in one step. Return the bytes of the file."""
    lines = [json.dumps({"name": document.name, "text": document.text}, ensure_ascii=False) for document in documents]
    parameters = zstandard.ZstdCompressionParameters.from_level(LEVEL, window_log=WINDOW)
    staged = path.with_name(f".{path.name}.new")
    total = sum(map(len, lines))
    with (
        staged.open("wb") as file,
        zstandard.ZstdCompressor(compression_params=parameters).stream_writer(file) as stream,
        tqdm(total=total, desc=f"compressing {path.name}", unit="B", unit_scale=True) as bar,
    ):
        for line in lines:
            stream.write(line.encode() + b"\n")
            bar.update(len(line))
    staged.replace(path)
    return path.stat().st_size


def describe(documents: Sequence[LongDocument]) -> dict[str, Any]:
    """Return the sizes of some documents, and a hash of their names and texts."""
    sizes = [len(document.text.encode()) for document in documents]
    digest = hashlib.blake2b(digest_size=16)
    for document in documents:
        digest.update(f"{document.name}\0{document.text}\0".encode())
    by_package: Counter[str] = Counter()
    for document, size in zip(documents, sizes, strict=True):
        by_package[document.name.split("/")[0].split(":")[0]] += size
    return {
        "documents": len(documents),
        "directories": len({document.name.rpartition(":")[0] for document in documents}),
        "bytes": sum(sizes),
        "documents_of": _histogram(sizes),
        "bytes_of_packages": dict(by_package),
        "fingerprint": digest.hexdigest(),
    }


def _histogram(sizes: Sequence[int]) -> dict[str, dict[str, int]]:
    """Return the number of documents and their bytes by size."""
    edges = [SMALLEST, 2 * SMALLEST, 4 * SMALLEST, 8 * SMALLEST, LARGEST]
    histogram = {}
    for low, high in zip(edges, [*edges[1:], None], strict=True):
        inside = [size for size in sizes if low <= size and (high is None or size < high)]
        label = f"{low // KIB} KiB or more" if high is None else f"{low // KIB} to {high // KIB} KiB"
        histogram[label] = {"documents": len(inside), "bytes": sum(inside)}
    return histogram

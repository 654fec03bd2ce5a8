"""Tokenizers by name or path, and documents as tokens."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Encoding
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loglinear.models import ByteTokenizer

TOGETHER = 1 << 22  # characters that a tokenizer takes at once; its output for them takes a hundred megabytes
Ranges = Sequence[tuple[int, int]]  # of a text's characters
BYTES = "bytes"  # the name of the built-in tokenizer
# Files of which each holds a vocabulary.
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json"),
    *("spiece.model", "sentencepiece.bpe.model"),
)


def load_tokenizer(name: str | Path, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """Return the built-in tokenizer for `"bytes"`, otherwise the tokenizer in a folder, for example a checkpoint.

    Raises ValueError if there is no tokenizer, or if it has more tokens than `vocab_size`, that of the model.
    """
    tokenizer = ByteTokenizer() if name == BYTES else _load_folder(name)
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise ValueError(f"tokenizer {name} has {len(tokenizer)} tokens, the model's vocab_size is {vocab_size}")
    return tokenizer


def has_vocabulary(folder: Path, names: Iterable[str] = ()) -> bool:
    """Return True if a folder holds a tokenizer's vocabulary, in a usual file or in one of these names."""
    return any((folder / name).is_file() for name in (*VOCABULARIES, *names))


def _load_folder(name: str | Path) -> PreTrainedTokenizerBase:
    if not Path(name).is_dir():
        raise ValueError(f"tokenizer must be 'bytes' or the folder of a Hugging Face tokenizer, got {str(name)!r}")
    missing = f"{name} has no tokenizer files: copy tokenizer.json and tokenizer_config.json into it"
    found = has_vocabulary(Path(name))
    if not found and not (Path(name) / "tokenizer_config.json").is_file():
        raise ValueError(missing)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many types: all mean that there is no tokenizer
        if not found:
            raise ValueError(missing) from error
        raise ValueError(f"no tokenizer could be loaded from {name}: {type(error).__name__}: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"{name} holds a {type(tokenizer).__name__}, expected a tokenizer of text")
    if isinstance(tokenizer, ByteTokenizer):
        if not found:
            raise ValueError(missing)
        _check_bytes(Path(name), tokenizer)
    # Some classes of transformers are made without their files, and then know no words. Some need none.
    needed = tokenizer.vocab_files_names.values()
    if needed and not has_vocabulary(Path(name), needed):
        raise ValueError(missing)
    return tokenizer


def _check_bytes(folder: Path, tokenizer: ByteTokenizer) -> None:
    """Raise ValueError unless the folder holds the byte tokenizer.

    transformers takes it for every checkpoint of ours whose tokenizer names no class that it knows.
    """
    file = folder / "tokenizer.json"
    model = json.loads(file.read_bytes()).get("model", {}) if file.is_file() else {}
    if model.get("vocab") != json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]:
        raise ValueError(
            f"{folder} holds another vocabulary than bytes, but tokenizer_config.json names no known class"
        )


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens before a document's text: the beginning-of-sequence token, if there is one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Return the ids of the beginning of a document: beginning-of-sequence token (if there is one) and text."""
    body = _ids(tokenizer, text, None)
    return np.concatenate([np.asarray(first_tokens(tokenizer), body.dtype), body])


def encode_document(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Return the ids of one document: beginning-of-sequence token (if there is one), text, end-of-sequence token."""
    ((tokens, _),) = encode_documents(tokenizer, [(text, None)])
    return tokens


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[tuple[str, Ranges | None]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, for each text, the ids of `encode_document` and a mask of the tokens that begin in its ranges (None: all).

    A fast tokenizer of transformers takes many texts at once on all cores. Texts are read only as they are needed.

    Raises ValueError for a tokenizer without an end-of-sequence token. Raises it also for ranges with a slow tokenizer,
    which does not tell where its tokens begin.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path} has no end-of-sequence token, which separates documents: "
            "name its eos_token in tokenizer_config.json"
        )
    batch: list[tuple[str, Ranges | None]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[0])
        if size >= TOGETHER:
            yield from _encode_batch(tokenizer, batch)
            batch, size = [], 0
    yield from _encode_batch(tokenizer, batch)


def _encode_batch(
    tokenizer: PreTrainedTokenizerBase, batch: Sequence[tuple[str, Ranges | None]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    first, last = first_tokens(tokenizer), [tokenizer.eos_token_id]
    encodings: Sequence[Encoding | None] = [None] * len(batch)
    if tokenizer.is_fast and batch and not isinstance(tokenizer, ByteTokenizer):
        options = dict(add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)
        encodings = tokenizer([text for text, _ in batch], **options).encodings
    for (text, ranges), encoding in zip(batch, encodings, strict=True):
        body = _ids(tokenizer, text, encoding)
        tokens = np.concatenate([np.asarray(first, body.dtype), body, np.asarray(last, body.dtype)])
        mask = np.full(len(tokens), ranges is None)
        if ranges is not None:
            begins = _begins(tokenizer, text, encoding)
            for start, end in ranges:
                mask[len(first) + bisect_left(begins, start) : len(first) + bisect_left(begins, end)] = True
        yield tokens, mask


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, encoding: Encoding | None) -> np.ndarray:
    if isinstance(tokenizer, ByteTokenizer):
        return tokenizer.encode_document(text)
    ids = tokenizer.encode(text, add_special_tokens=False) if encoding is None else encoding.ids
    return np.asarray(ids, dtype=np.uint32)


def _begins(tokenizer: PreTrainedTokenizerBase, text: str, encoding: Encoding | None) -> Sequence[int]:
    """Return, for each token, the first character of which it is a part."""
    if isinstance(tokenizer, ByteTokenizer):
        every_byte = (place for place, character in enumerate(text) for _ in character.encode())
        return range(len(text)) if text.isascii() else list(every_byte)
    if encoding is None:
        raise ValueError(f"{type(tokenizer).__name__} does not tell where tokens begin: give a fast tokenizer")
    return [begin for begin, _ in encoding.offsets]

"""The built-in byte tokenizer, and loading of any Hugging Face tokenizer by path."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import AddedToken

from loglinear.models import LogLinearConfig

TOGETHER = 1 << 22  # characters that a tokenizer takes at once: a hundred megabytes of what it makes of them
Ranges = Sequence[tuple[int, int]]  # of a text's characters
BYTES = "bytes"  # the name of the built-in tokenizer wherever a tokenizer is asked for


class ByteTokenizer(PreTrainedTokenizer):
    """UTF-8 bytes are their own token ids, 0 to 255; 256 is <bos>, 257 <eos>, 258 <pad>.

    `tokenizer("text")` puts <bos> in front, which is how a document starts in training. A saved one comes back through
    `AutoTokenizer` wherever `loglinear.training` has been imported.
    """

    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"  # what batched generation needs

    def __init__(
        self,
        bos_token: str | AddedToken = "<bos>",
        eos_token: str | AddedToken = "<eos>",
        pad_token: str | AddedToken = "<pad>",
        **kwargs: Any,
    ) -> None:
        special = [
            AddedToken(str(token), normalized=False, special=True) for token in (bos_token, eos_token, pad_token)
        ]
        self._added_tokens_decoder = {256 + i: token for i, token in enumerate(special)}
        super().__init__(bos_token=special[0], eos_token=special[1], pad_token=special[2], **kwargs)

    @property
    def vocab_size(self) -> int:
        """Ids without the special ones."""
        return 256

    def get_vocab(self) -> dict[str, int]:
        """Token text to id; byte b is written chr(b)."""
        return {**{chr(byte): byte for byte in range(256)}, **self.added_tokens_encoder}

    def encode_document(self, text: str) -> np.ndarray:
        """The bytes of `text` as uint16 ids, without special tokens: what `encode` gives, thousands of times faster."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None):
        """<bos>, then the ids."""
        return [self.bos_token_id, *token_ids_0, *(token_ids_1 or [])]

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int | None:
        return ord(token) if len(token) == 1 else None

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index) if index < 256 else ""  # ids past <pad> only pad the model's table

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Bytes back to text; what is not UTF-8 becomes the replacement character."""
        parts = [token.encode() if token in self._added_tokens_encoder else token.encode("latin-1") for token in tokens]
        return b"".join(parts).decode(errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """There is no vocabulary file."""
        return ()


AutoTokenizer.register(LogLinearConfig, ByteTokenizer)


def load_tokenizer(name: str | Path, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """`"bytes"` for the built-in tokenizer, otherwise the folder of a Hugging Face tokenizer (or of a checkpoint).

    Raises ValueError where there is no tokenizer, one without an end-of-sequence token, or one with more tokens than
    `vocab_size`, the model's.
    """
    tokenizer = ByteTokenizer() if name == BYTES else _load_folder(name)
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise ValueError(f"tokenizer {name} has {len(tokenizer)} tokens, the model's vocab_size is {vocab_size}")
    return tokenizer


def _load_folder(name: str | Path) -> PreTrainedTokenizerBase:
    if not Path(name).is_dir():
        raise ValueError(f"tokenizer must be 'bytes' or the folder of a Hugging Face tokenizer, got {str(name)!r}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of transformers, or Exception itself, of tokenizers: all mean that it is none
        raise ValueError(f"no tokenizer could be loaded from {name}: {type(error).__name__}: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"{name} holds a {type(tokenizer).__name__}, expected a tokenizer of text")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name} has no end-of-sequence token, which separates documents")
    return tokenizer


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before a document's text: its beginning-of-sequence token, where there is one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def encode_document(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Ids of one document: beginning-of-sequence token (where there is one), text, end-of-sequence token."""
    ((tokens, _),) = encode_documents(tokenizer, [(text, None)])
    return tokens


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[tuple[str, Ranges | None]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each text and its ranges of characters: `encode_document`, and which tokens begin in the ranges (None: all).

    A fast tokenizer of transformers' takes many texts at once, on all cores; they are read as they are needed. Raises
    ValueError for ranges with a slow one, which does not say where its tokens begin.
    """
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
    if tokenizer.is_fast and batch:
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
    """For each token the first character of which it is a part."""
    if isinstance(tokenizer, ByteTokenizer):
        every_byte = (place for place, character in enumerate(text) for _ in character.encode())
        return range(len(text)) if text.isascii() else list(every_byte)
    if encoding is None:
        raise ValueError(f"{type(tokenizer).__name__} does not say where tokens begin: give a fast tokenizer")
    return [begin for begin, _ in encoding.offsets]

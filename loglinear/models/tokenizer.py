"""The built-in byte tokenizer, and a chat template for models that are fine-tuned on messages."""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.tokenization_utils_base import AddedToken

from loglinear.models.auto_file import TOKENIZER_AUTO_MAP, write_auto_file

# A base model has learned no turns, so a tokenizer gets this template only from fine-tuning on messages.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


class ByteTokenizer(PreTrainedTokenizerFast):
    """The byte tokenizer: token ids 0 to 255 are UTF-8 bytes, 256 is <bos>, 257 <eos>, 258 <pad>.

    `tokenizer("text")` returns the bytes alone. With `add_bos_token=True`, here or as an attribute, it puts <bos> in
    front, as training does for every document. The default is False because lm-eval adds <bos> itself. `AutoTokenizer`
    loads a saved tokenizer if `loglinear.models` is imported.
    """

    vocab_files_names: dict[str, str] = {}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"  # batched generation needs it

    def __init__(
        self,
        bos_token: str | AddedToken = "<bos>",
        eos_token: str | AddedToken = "<eos>",
        pad_token: str | AddedToken = "<pad>",
        **kwargs: Any,
    ) -> None:
        symbols = bytes_to_unicode()
        self._tokenizer = Tokenizer(models.BPE({symbols[byte]: byte for byte in range(256)}, []))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        special = [
            AddedToken(str(token), normalized=False, special=True) for token in (bos_token, eos_token, pad_token)
        ]
        self._tokenizer.add_special_tokens(special)
        for name in ("vocab", "merges", "tokenizer_file", "tokenizer_object"):
            kwargs.pop(name, None)  # the vocabulary of bytes never changes
        kwargs.setdefault("auto_map", {"AutoTokenizer": list(TOKENIZER_AUTO_MAP)})
        kwargs = {"clean_up_tokenization_spaces": False, "padding_side": self.padding_side, **kwargs}
        super().__init__(bos_token=special[0], eos_token=special[1], pad_token=special[2], **kwargs)
        around = self._tokenizer.encode("").ids  # a saved tokenizer tells it in its template alone
        self._add_bos_token, self._add_eos_token = (i in around for i in (self.bos_token_id, self.eos_token_id))

    def encode_document(self, text: str) -> np.ndarray:
        """Return the bytes of `text` as uint16 ids without special tokens; much faster than `encode`."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    @wraps(PreTrainedTokenizerFast.save_pretrained, assigned=())  # other tools inspect its arguments
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Save as transformers does, and add the file through which tools load the class without importing it."""
        write_auto_file(save_directory)
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoTokenizer") -> None:
        """Do nothing: every save already names the class, and a copy of its code in a checkpoint would become stale."""

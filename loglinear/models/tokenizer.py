"""The built-in byte tokenizer, and a chat template for models that are taught turns."""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.tokenization_utils_base import AddedToken

from loglinear.models.auto_file import TOKENIZER_AUTO_MAP, write_auto_file

# A base model knows no turns, so no tokenizer has this template until fine-tuning on messages sets it.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


class ByteTokenizer(PreTrainedTokenizerFast):
    """UTF-8 bytes are their own token ids, 0 to 255; 256 is <bos>, 257 <eos>, 258 <pad>.

    `tokenizer("text")` gives the bytes alone. With `add_bos_token=True`, here or as an attribute, <bos> stands in
    front, as in front of every document in training. The default leaves it out, because lm-eval puts it there itself.
    A saved tokenizer comes back through `AutoTokenizer` wherever `loglinear.models` has been imported.
    """

    vocab_files_names: dict[str, str] = {}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"  # what batched generation needs

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
            kwargs.pop(name, None)  # bytes are always the same, whatever a saved file says
        kwargs.setdefault("auto_map", {"AutoTokenizer": list(TOKENIZER_AUTO_MAP)})
        kwargs = {"clean_up_tokenization_spaces": False, "padding_side": self.padding_side, **kwargs}
        super().__init__(bos_token=special[0], eos_token=special[1], pad_token=special[2], **kwargs)
        around = self._tokenizer.encode("").ids  # a saved one says in its template alone what it adds
        self._add_bos_token, self._add_eos_token = (i in around for i in (self.bos_token_id, self.eos_token_id))

    def encode_document(self, text: str) -> np.ndarray:
        """The bytes of `text` as uint16 ids, without special tokens, hundreds of times faster than `encode`."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    @wraps(PreTrainedTokenizerFast.save_pretrained, assigned=())  # others look for its arguments by name
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Save as transformers does, with the file that loads the class where nothing has imported this library."""
        write_auto_file(save_directory)
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoTokenizer") -> None:
        """Do nothing: every save already names the class, and a copy of its code would grow old beside a checkpoint."""

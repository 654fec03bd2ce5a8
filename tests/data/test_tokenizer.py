import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from loglinear.data import tokenizer
from loglinear.data.tokenizer import encode_document, encode_documents, encode_prompt, load_tokenizer
from loglinear.models import ByteTokenizer

TEXT = "naïve café, 数学\n\ttabs \x00 and 😀"


def test_a_document_of_bytes_is_the_tokenizers_own_encoding_between_bos_and_eos():
    assert encode_document(ByteTokenizer(), TEXT).tolist() == [256, *ByteTokenizer()(TEXT)["input_ids"], 257]


def test_a_saved_tokenizer_is_loaded_as_it_was(tmp_path):
    ByteTokenizer().save_pretrained(tmp_path)
    assert type(load_tokenizer(tmp_path)) is ByteTokenizer


def test_any_hugging_face_tokenizer_by_path(tmp_path, monkeypatch):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "hello": 2, "world": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    ids = encode_document(load_tokenizer(tmp_path), "hello world again")
    assert ids.dtype == np.uint32 and ids.tolist() == [2, 3, 0, 1]
    texts, ranges = ["hello world again", "world", "hello hello"], [[(6, 11), (11, 17), (0, 0)], None, [(0, 1)]]
    monkeypatch.setattr(tokenizer, "TOGETHER", 20)  # two batches
    encoded = encode_documents(load_tokenizer(tmp_path), zip(texts, ranges, strict=True))
    assert [(tokens.tolist(), mask.tolist()) for tokens, mask in encoded] == [
        ([2, 3, 0, 1], [False, True, True, False]),
        ([3, 1], [True, True]),
        ([2, 2, 1], [True, False, False]),
    ]


def test_a_tokenizer_that_does_not_say_where_tokens_begin_is_named():
    class Slow:
        bos_token_id, eos_token_id, is_fast = None, 1, False
        encode = staticmethod(lambda text, **_: [2] * len(text))

    assert encode_document(Slow(), "text").tolist() == [2, 2, 2, 2, 1]
    with pytest.raises(ValueError, match="Slow does not tell where tokens begin: give a fast tokenizer"):
        list(encode_documents(Slow(), [("text", [(0, 1)])]))


def test_missing_tokenizer_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="tokenizer must be 'bytes' or the folder"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(
        ValueError, match="has no tokenizer files: copy tokenizer.json and tokenizer_config.json into it"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", [None, "PreTrainedTokenizerFast", "Qwen2Tokenizer", "LlamaTokenizer"])
@pytest.mark.parametrize("kind", ["qwen3_next", "mamba2", "loglinear"])
def test_a_folder_without_a_vocabulary_has_no_tokenizer(tmp_path, name, kind):
    """Some classes of transformers are made without files, and then know no words."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    if name is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "eos_token": "</s>"}))
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path)
    assert (
        str(caught.value) == f"{tmp_path} has no tokenizer files: copy tokenizer.json and tokenizer_config.json into it"
    )


def test_a_tokenizer_that_needs_no_files_is_loaded(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("a").input_ids == ByT5Tokenizer()("a").input_ids


def test_prompts_need_no_end_of_sequence_and_documents_do(tmp_path):
    words_without_end(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert encode_prompt(loaded, "b a").tolist() == [2, 1]
    with pytest.raises(ValueError, match=f"tokenizer {tmp_path} has no end-of-sequence token, which separates"):
        encode_document(loaded, "b a")


def words_without_end(folder):
    """Save a tokenizer of two words without an end-of-sequence token."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizer

from loglinear.training import tokenizer
from loglinear.training.tokenizer import ByteTokenizer, encode_document, encode_documents, load_tokenizer

TEXT = "naïve café, 数学\n\ttabs \x00 and 😀"


def test_ids_are_utf8_bytes_behind_bos():
    tokenizer = ByteTokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizer)
    assert tokenizer(TEXT)["input_ids"] == [256, *TEXT.encode()]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
    assert len(tokenizer) == 259


def test_decode_is_the_inverse_of_encode():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True) == TEXT


def test_decoding_survives_broken_utf8_and_unused_ids():
    assert ByteTokenizer().decode([104, 0xFF, 263, 105]) == "h\ufffdi"


def test_fast_encoding_equals_the_tokenizers_own():
    tokenizer = ByteTokenizer()
    assert encode_document(tokenizer, TEXT).tolist() == [*tokenizer(TEXT)["input_ids"], 257]


@pytest.mark.parametrize("load", [load_tokenizer, AutoTokenizer.from_pretrained])
def test_saved_tokenizer_comes_back_the_same(tmp_path, load):
    ByteTokenizer().save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is ByteTokenizer
    assert loaded(TEXT)["input_ids"] == ByteTokenizer()(TEXT)["input_ids"]
    assert loaded.get_vocab() == ByteTokenizer().get_vocab()


def test_batches_pad_on_the_left():
    batch = ByteTokenizer()(["abc", "a"], padding=True)
    assert batch["input_ids"][1] == [258, 258, 256, ord("a")]
    assert batch["attention_mask"][1] == [0, 0, 1, 1]


def test_any_hugging_face_tokenizer_by_path(tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

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
    with pytest.raises(ValueError, match="Slow does not say where tokens begin: give a fast tokenizer"):
        list(encode_documents(Slow(), [("text", [(0, 1)])]))


def test_missing_tokenizer_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="tokenizer must be 'bytes' or the folder"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)

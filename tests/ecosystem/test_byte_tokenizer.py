import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from loglinear.models import CHAT_TEMPLATE, ByteTokenizer

TEXT = "naïve café , 数学\n\ttabs \x00 don't and 😀"
SPECIAL = {256: b"<bos>", 257: b"<eos>", 258: b"<pad>"}


def test_ids_are_utf8_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.is_fast
    assert tokenizer(TEXT)["input_ids"] == list(TEXT.encode())
    assert tokenizer("a<eos>b<pad><bos>")["input_ids"] == [97, 257, 98, 258, 256]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
    assert (len(tokenizer), tokenizer.vocab_size) == (259, 256)
    assert sorted(tokenizer.get_vocab().values()) == list(range(259))


def test_every_character_is_its_bytes_and_back():
    tokenizer = ByteTokenizer()
    everything = "".join(chr(code) for code in range(0x3000) if not 0xD800 <= code < 0xE000)
    ids = tokenizer(everything)["input_ids"]
    assert ids == list(everything.encode()) and tokenizer.decode(ids) == everything


def test_decoding_survives_broken_utf8_and_unused_ids():
    tokenizer = ByteTokenizer()
    starts = torch.tensor(
        [0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xED, 0xA0, 0xF0, 0x9F, 0x98, 0x80, 0xF4, 0x90, 256, 263]
    )
    for choice in torch.randint(0, len(starts), (300, 12)):
        ids = starts[choice].tolist()
        whole = b"".join(SPECIAL.get(i, bytes([i]) if i < 256 else b"") for i in ids)
        assert tokenizer.decode(ids) == whole.decode(errors="replace")
    assert tokenizer.decode([256, 104, 105, 257], skip_special_tokens=True) == "hi"


@pytest.mark.parametrize("add", [False, True])
def test_bos_stands_in_front_where_it_is_asked_for(tmp_path, add):
    tokenizer = ByteTokenizer(add_bos_token=add)
    assert tokenizer("ab")["input_ids"] == [256] * add + [97, 98]
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.add_bos_token == add and saved("ab")["input_ids"] == [256] * add + [97, 98]
    other = AutoTokenizer.from_pretrained(tmp_path, add_bos_token=not add)
    assert other("ab")["input_ids"] == [256] * (not add) + [97, 98]
    other.add_bos_token = add
    assert other("ab")["input_ids"] == [256] * add + [97, 98]
    assert other("ab", add_special_tokens=False)["input_ids"] == [97, 98]


def test_batches_pad_on_the_left():
    batch = ByteTokenizer()(["abc", "é"], padding=True)
    assert batch["input_ids"][1] == [258, *"é".encode()]
    assert batch["attention_mask"][1] == [0, 1, 1]


def test_characters_know_their_tokens():
    encoded = ByteTokenizer()("é😀a")
    assert [encoded.char_to_token(i) for i in range(3)] == [0, 2, 6]
    assert [encoded.token_to_chars(i).start for i in range(7)] == [0, 0, 1, 1, 1, 1, 2]


def test_saved_tokenizer_comes_back_the_same(tmp_path):
    ByteTokenizer(bos_token="<s>").save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is ByteTokenizer and loaded.padding_side == "left"
    assert loaded("<s>" + TEXT)["input_ids"] == [256, *TEXT.encode()]
    assert loaded.get_vocab() == ByteTokenizer(bos_token="<s>").get_vocab()


def test_added_tokens_are_kept(tmp_path):
    tokenizer = ByteTokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(10)])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == 270
    assert loaded("a<extra3><turn>")["input_ids"] == tokenizer("a<extra3><turn>")["input_ids"] == [97, 262, 269]


def test_a_folder_saved_before_there_was_a_tokenizer_file_still_loads(tmp_path):
    special = {str(256 + i): {"content": token, "special": True} for i, token in enumerate(("<bos>", "<eos>", "<pad>"))}
    config = {
        "added_tokens_decoder": {
            key: {**value, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
            for key, value in special.items()
        },
        "backend": "custom",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<pad>",
        "tokenizer_class": "ByteTokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text('{"<bos>": 256, "<eos>": 257, "<pad>": 258}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is ByteTokenizer and len(loaded) == 259
    assert loaded("é<eos>")["input_ids"] == [*"é".encode(), 257]


def test_importing_the_models_alone_registers_the_tokenizer(tmp_path):
    ByteTokenizer().save_pretrained(tmp_path)
    code = (
        "import sys, loglinear.models, transformers\n"
        "assert 'loglinear.training' not in sys.modules\n"
        f"print(type(transformers.AutoTokenizer.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "ByteTokenizer"


def test_a_base_models_tokenizer_knows_no_turns_until_it_is_given_them():
    tokenizer = ByteTokenizer()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "é"}]
    with pytest.raises(ValueError, match="chat_template is not set"):
        tokenizer.apply_chat_template(messages)
    tokenizer.chat_template = CHAT_TEMPLATE
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    text = [256, *b"user: hi", 257, *b"assistant: ", *"é".encode(), 257]
    assert encoded["input_ids"] == text
    assert encoded["assistant_masks"] == [0] * (len(text) - 3) + [1, 1, 1]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    assert prompt == "<bos>user: hi<eos>assistant: "

"""Training text that a folder keeps as tokens is that of `read_corpus`, and is made once."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from experiments import tokens
from experiments.needle import byte_pair_tokenizer
from experiments.tokens import ARRAYS, tokens_of
from loglinear.data.corpus import join, read_corpus, split
from loglinear.data.sources import needles_of, read_documents
from loglinear.data.tokenizer import load_tokenizer

SOURCES = ("needle:7:500", "needle:5:300")


def equal(a, b):
    same = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ARRAYS)
    return same and (a.names, a.special, a.fingerprint) == (b.names, b.special, b.fingerprint)


@pytest.mark.parametrize("processes", [1, 2])
def test_kept_tokens_are_those_of_the_sources(tmp_path, monkeypatch, capsys, processes):
    monkeypatch.setattr(tokens, "SHARE", 3)
    right = read_corpus(SOURCES, load_tokenizer("bytes"))
    assert equal(tokens_of(SOURCES, "bytes", tmp_path, processes=processes), right)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(tokens, "_made", None)  # the second time nothing is made
    kept = tokens_of(SOURCES, "bytes", tmp_path)
    (folder,) = tmp_path.glob("[0-9a-f]*")
    assert capsys.readouterr().err == f"training text: the tokens in {folder}, made before\n"
    assert equal(kept, right)
    for ours, theirs in zip(split(kept, 0.3), split(right, 0.3), strict=True):
        assert equal(ours, theirs)


def test_another_text_is_kept_beside_the_first(tmp_path):
    one, other = (tokens_of([source], "bytes", tmp_path) for source in SOURCES)
    assert not equal(one, other) and equal(one, tokens_of(SOURCES[:1], "bytes", tmp_path))


def test_the_files_of_a_tokenizer_decide_its_tokens(tmp_path):
    """`tokenizer.json` names no token for the beginning of a document."""
    folder = tmp_path / "tokenizer"
    byte_pair_tokenizer(["one two", "three"], 300).save_pretrained(folder)
    source = ["needle:3:500"]
    first = tokens_of(source, str(folder), tmp_path / "tokens", processes=1)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "bos_token": None}))
    second = tokens_of(source, str(folder), tmp_path / "tokens", processes=1)
    assert not equal(first, second) and equal(second, read_corpus(source, load_tokenizer(folder)))


def test_tokens_of_other_code_are_made_again(tmp_path, monkeypatch):
    made, calls = tokens._made, []
    monkeypatch.setattr(tokens, "_made", lambda *arguments: calls.append(arguments) or made(*arguments))
    for text in ("# a rule", "# a rule", "# another rule"):
        (tmp_path / "needles.py").write_text(text)
        monkeypatch.setattr(tokens, "CODE", [*tokens.CODE[:1], tmp_path / "needles.py"])
        tokens_of(SOURCES[:1], "bytes", tmp_path / "tokens", processes=1)
    assert len(calls) == 2


def test_programs_that_start_at_once_make_it_once(tmp_path, monkeypatch):
    """Threads stand for them: a lock belongs to an open file, and each call opens its own."""
    made, calls = tokens._made, []

    def slowly(*arguments):
        calls.append(arguments)
        time.sleep(0.2)
        return made(*arguments)

    monkeypatch.setattr(tokens, "_made", slowly)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: tokens_of(SOURCES, "bytes", tmp_path, processes=1), range(3)))
    assert len(calls) == 1 and all(equal(one, found[0]) for one in found)


def test_files_are_refused_because_they_change(tmp_path):
    for source in (str(tmp_path), f"needle:4:500:{tmp_path}", "datasets:wikitext"):
        with pytest.raises(ValueError, match="must be stdlib or needle:COUNT:LENGTH"):
            tokens_of([source], "bytes", tmp_path)


def test_a_part_of_the_needles_has_their_numbers_and_texts():
    whole = list(read_documents(["needle:7:500"]))
    assert list(needles_of("needle:7:500", range(2, 5))) == whole[2:5]


def test_joined_corpora_are_as_if_read_together():
    tokenizer = load_tokenizer("bytes")
    assert equal(join([read_corpus([source], tokenizer) for source in SOURCES]), read_corpus(SOURCES, tokenizer))

from dataclasses import replace

import numpy as np
import pytest

from loglinear.data.corpus import Corpus, load_corpus, split, tokenize
from loglinear.data.sources import Document
from loglinear.models import ByteTokenizer


def corpus_of(lengths):
    """Document d is made of the letter number d only; with <bos> and <eos> it has lengths[d] tokens."""
    return tokenize(
        [Document(f"doc{d}", chr(97 + d) * (length - 2)) for d, length in enumerate(lengths)], ByteTokenizer()
    )


def test_split_is_by_document_whole_and_stable_when_others_are_added():
    few = [Document(f"doc{d}", "x" * 50) for d in range(40)]
    train, validation = split(tokenize(few, ByteTokenizer()), 0.25)
    assert set(train.names) | set(validation.names) == {document.name for document in few}
    assert not set(train.names) & set(validation.names)
    assert all(len(validation.document(d)) == 52 for d in range(len(validation.names)))
    more = few + [Document(f"new{d}", "y") for d in range(40)]
    _, larger = split(tokenize(more, ByteTokenizer()), 0.25)
    assert set(validation.names) == {name for name in larger.names if name.startswith("doc")}


def test_split_does_not_depend_on_the_order_of_reading():
    documents = [Document(f"doc{d}", f"text {d}") for d in range(20)]
    forward = tokenize(documents, ByteTokenizer())
    backward = tokenize(documents[::-1], ByteTokenizer())
    assert forward.fingerprint == backward.fingerprint


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_both_sides_always_have_text(fraction):
    train, validation = split(corpus_of([10, 10, 10]), fraction)
    assert len(train.names) >= 1 and len(validation.names) >= 1


def test_single_document_is_cut_and_its_end_validates():
    corpus = corpus_of([100])
    train, validation = split(corpus, 0.1)
    assert np.array_equal(np.concatenate([train.tokens, validation.tokens]), corpus.tokens)
    assert len(validation.tokens) == 10


def test_byte_tokens_stand_for_one_byte_and_special_ones_for_none(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 49)  # 98 bytes, 100 tokens
    (tmp_path / "b.txt").write_text("é" * 49)
    for corpus in load_corpus([str(tmp_path)], ByteTokenizer(), 0.5):
        assert corpus.token_bytes(0, 100).tolist() == [0, *[1] * 98, 0]


def test_tokens_of_any_tokenizer_share_their_own_documents_bytes():
    tokens, all_learnt = np.array([0, 7, 7, 1, 0, 7, 1]), np.ones(7, bool)
    corpus = Corpus(("a", "b"), tokens, np.array([0, 4, 7]), np.array([10, 3]), all_learnt, (0, 1))
    assert corpus.token_bytes(0, 4).tolist() == [0, 5, 5, 0]
    assert corpus.token_bytes(5, 7).tolist() == [3, 0]
    spans = np.array([[0, 4], [1, 2], [4, 7], [6, 7]])  # of a single token nothing is predicted
    assert corpus.predicted_in(spans) == (5, 13.0)
    some = replace(corpus, learnt=np.array([True, False, True, True, False, False, True]))
    assert some.predicted_in(spans) == (3, 5.0)


def test_counting_the_tokens_of_a_row_keeps_nothing_for_all_other_tokens():
    """A text of 10 GB has 10^10 tokens."""
    rng, ends_D = np.random.default_rng(0), np.array([0, 7, 8, 60, 61, 1000])
    names = tuple(map(str, range(5)))
    tokens, learnt = rng.integers(9, size=1000).astype(np.uint16), rng.random(1000) < 0.7
    corpus = Corpus(names, tokens, ends_D, rng.integers(1, 99, size=5), learnt, (0, 1))
    known = dict(vars(corpus), bytes_per_text_token_D=corpus.bytes_per_text_token_D)
    spans = np.array([[61, 1000], [8, 60], [60, 61], [3, 7], [61, 70], [0, 1]])  # in any order, and twice the same
    expected = [
        (np.count_nonzero(learnt[begin + 1 : end]), (corpus.token_bytes(begin, end) * learnt[begin:end])[1:].sum())
        for begin, end in spans
    ]
    count, size = corpus.predicted_in(spans)
    assert count == sum(number for number, _ in expected)
    assert size == pytest.approx(sum(size for _, size in expected), rel=1e-12)
    assert corpus.predicted_in(spans[-1:]) == (0, 0.0)
    assert vars(corpus).keys() == known.keys()


def test_lone_surrogate_names_the_document():
    with pytest.raises(ValueError, match="document rows.jsonl:3 is not text"):
        tokenize([Document("rows.jsonl:3", "a\ud800")], ByteTokenizer())

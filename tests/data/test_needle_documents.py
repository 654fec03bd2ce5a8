import math
import re
from random import Random

import numpy as np
import pytest

from loglinear.data.needle_documents import TELLING, needle_documents, told_again
from loglinear.data.needles import HELD_OUT, LONGEST_SENTENCE, NOISE, draw_key, draw_value, is_held_out
from loglinear.data.sources import name_hash, read_documents
from loglinear.data.tokenizer import encode_document
from loglinear.models import ByteTokenizer

PROSE = " ".join(f"Sentence {i} of the prose says {i * i} and ends." for i in range(400))
NEEDLE = re.compile(r"One of the special magic numbers for ([a-z]{5}-[a-z]{5}) is: (\d{7})\.")
QUESTION = re.compile(r"for ([a-z, -]+) mentioned in the provided text (?:is|are) ([\d, and]+)\.")


@pytest.fixture(scope="module")
def documents():
    return list(needle_documents(2000, 2000, [PROSE]))


def listed(text):
    return re.split(r", and |, ", text)


def test_every_answer_is_in_the_text_and_no_key_is_asked_twice(documents):
    number_of_questions = []
    for text in documents:
        needles, asked = list(dict.fromkeys(NEEDLE.findall(text))), []
        questions = QUESTION.findall(text)
        for keys, values in questions:
            assert listed(values) == [value for key in listed(keys) for k, value in needles if k == key]
            asked += listed(keys)
        assert len(asked) == len(set(asked)) and set(asked) <= {key for key, _ in needles}
        assert bool(questions) == ("I will quiz you" in text) == ("What " in text)
        if questions:
            assert text.index(NEEDLE.search(text)[0]) < text.index("What ") and text.endswith(".")
        number_of_questions.append(len(questions))
    assert {0, 1, 2, 3} <= set(number_of_questions)


def test_every_octave_of_lengths_has_as_many_documents(documents):
    sizes = np.array([len(text.encode()) for text in documents])
    assert sizes.max() <= 2000 and sizes.min() > 200 - LONGEST_SENTENCE
    octaves = [np.sum((low <= sizes) & (sizes < 2 * low)) for low in (250, 500, 1000)]
    assert octaves / np.mean(octaves) == pytest.approx([1, 1, 1], abs=0.1)


def test_answers_are_asked_for_from_afar(documents):
    """Half of the bytes are in documents of more than half the longest length, and so are answers from as far back."""
    sizes = np.array([len(text.encode()) for text in documents])
    assert sizes[sizes > 1000].sum() > 0.5 * sizes.sum()
    distances = [
        question.start() - text.index(f"for {listed(question[1])[0]} is:")
        for text in documents
        for question in QUESTION.finditer(text)
    ]
    assert np.mean(np.array(distances) > 500) > 0.25 and np.mean(np.array(distances) > 1000) > 0.1


def test_needles_are_few_or_many_and_lie_in_noise_or_in_text(documents):
    told = [NEEDLE.findall(text) for text in documents]
    counts, different = np.array([len(needles) for needles in told]), [set(needles) for needles in told]
    assert counts.min() >= 2 and 20 < counts.max() <= 2000 // TELLING
    assert all(len(needles) < len(all_told) for needles, all_told in zip(different, told, strict=True))
    assert sum(len(needles) == 1 for needles in different) > 500 and max(map(len, different)) > 10
    assert sum(len(needles) > len({key for key, _ in needles}) for needles in different) > 100  # values of one key
    noise, prose = (sum(part in text for text in documents) for part in (NOISE, "of the prose says"))
    assert noise > 500 and prose > 500
    assert all(NOISE not in text or "of the prose says" not in text for text in documents)
    counted = sum(end - start for text in documents for start, end in told_again(text))
    assert counted / sum(map(len, documents)) > 0.1


def test_documents_are_the_same_for_every_count():
    assert list(needle_documents(3, 600, [PROSE])) == list(needle_documents(9, 600, [PROSE]))[:3]


def test_no_key_and_no_value_of_a_training_document_is_one_for_tests(documents):
    for text in documents:
        assert not any(is_held_out(part) for needle in NEEDLE.findall(text) for part in needle)
    rng = Random(0)
    assert all(is_held_out(draw(rng, held_out=True)) for draw in (draw_key, draw_value) for _ in range(200))
    shares = [np.mean([is_held_out(str(10**6 + 7 * i)) for i in range(4000)])]
    shares += [np.mean([is_held_out(draw_key(rng, held_out=False) + suffix) for i in range(4000)]) for suffix in "xy"]
    assert shares == pytest.approx([HELD_OUT] * 3, abs=4 * math.sqrt(HELD_OUT * (1 - HELD_OUT) / 4000))


def test_source_makes_documents_that_fit_into_a_length(tmp_path):
    (tmp_path / "a:b.txt").write_text(PROSE)
    documents = list(read_documents([f"needle:40:700:{tmp_path / 'a:b.txt'}"]))
    assert [document.name for document in documents] == [f"needle:700:{tmp_path / 'a:b.txt'}:{i}" for i in range(40)]
    assert max(len(encode_document(ByteTokenizer(), document.text)) for document in documents) <= 700
    assert any("of the prose says" in document.text for document in documents)
    assert not any("of the prose says" in document.text for document in read_documents(["needle:40:700"]))


@pytest.mark.parametrize("source", ["needle:", "needle:5", "needle:x:600", "needle:5:-600", "needle:5:600.5"])
def test_source_that_is_none_is_named(source):
    with pytest.raises(ValueError, match=f"data '{source}' must be needle:COUNT:LENGTH or needle:COUNT:LENGTH:SOURCE"):
        list(read_documents([source]))


def test_what_may_validate_is_no_haystack(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(" ".join(f"Sentence {word} of document {i}." for word in "abcdefgh"))
    validating = [document.name for document in read_documents([str(tmp_path)]) if name_hash(document.name) < 0.1]
    assert 0 < len(validating) < 30
    made = " ".join(document.text for document in read_documents([f"needle:1500:900:{tmp_path}"]))
    seen = {i for i in range(60) if f"of document {i}." in made}
    assert seen == {i for i in range(60) if f"{i}.txt" not in validating}


def test_impossible_documents_are_named(tmp_path):
    with pytest.raises(ValueError, match="must be 1 or more of 200 bytes or more, got 0 of 598"):
        list(read_documents(["needle:0:600"]))
    with pytest.raises(ValueError, match="is neither a file"):
        list(read_documents([f"needle:5:600:{tmp_path / 'nothing'}"]))
    (tmp_path / "blank.txt").write_text(" \n ")
    with pytest.raises(ValueError, match="the haystack's text has no sentence"):
        list(read_documents([f"needle:5:600:{tmp_path / 'blank.txt'}"]))


def test_the_loss_counts_whatever_comes_again_and_nothing_new(documents):
    key_or_value = re.compile(r"\d{7}|[a-z]{5}-[a-z]{5}")
    for text in documents:
        counted = {place for start, end in told_again(text) for place in range(start, end)}
        seen = set()
        for found in key_or_value.finditer(text):
            assert (set(range(*found.span())) <= counted) == (found[0] in seen)
            assert counted.isdisjoint(range(*found.span())) == (found[0] not in seen)
            seen.add(found[0])


def test_the_loss_counts_all_that_an_answer_is_scored_by(documents):
    """Also the space before a value: without it models that could recall every value answered none."""
    for text in documents:
        counted = {place for start, end in told_again(text) for place in range(start, end)}
        for question in QUESTION.finditer(text):
            answer = range(question.start(2) - len(" "), question.end())  # " 1, 2, and 3."
            assert text[answer.start] == " " and set(answer) <= counted


def test_needle_documents_say_what_the_loss_counts():
    for document in read_documents(["needle:20:700"]):
        assert document.learnt == tuple(told_again(document.text)) != ()

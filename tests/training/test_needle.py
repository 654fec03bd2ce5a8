import math
import re
from random import Random

import numpy as np
import pytest

from loglinear.training.needle import (
    HELD_OUT,
    LONGEST_SENTENCE,
    NOISE,
    TELLING,
    Haystack,
    Needle,
    Question,
    draw_key,
    draw_value,
    hide,
    is_held_out,
    needle_documents,
    split_sentences,
    told_again,
    words,
)
from loglinear.training.sources import name_hash, read_documents
from loglinear.training.tokenizer import ByteTokenizer, encode_document

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


def test_every_octave_of_lengths_has_as_many_bytes(documents):
    sizes = np.array([len(text.encode()) for text in documents])
    assert sizes.max() <= 2000 and sizes.min() > 200 - LONGEST_SENTENCE
    octaves = [sizes[(low <= sizes) & (sizes < 2 * low)].sum() for low in (250, 500, 1000)]
    assert octaves / np.mean(octaves) == pytest.approx([1, 1, 1], abs=0.1)


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


def test_keys_are_pairs_of_a_thousand_words():
    rng = Random(0)
    assert len(words()) == len(set(words())) == 1000 and words() == words()
    keys = [draw_key(rng, held_out=False) for _ in range(10_000)]
    assert len(set(keys)) > 9900
    assert {word for key in keys for word in key.split("-")} == set(words())


def test_wording_follows_the_number_of_values():
    one = Question.about(["a-b"], [Needle("c-d", "2"), Needle("a-b", "1")])
    assert one.introduction.startswith("A special magic number is hidden") and one.introduction.endswith(
        "I will quiz you about the number afterwards."
    )
    assert one.text == (
        "What is the special magic number for a-b mentioned in the provided text? "
        "The special magic number for a-b mentioned in the provided text is"
    )
    assert one.answer == [" 1"]
    three = Question.about(["c-d", "a-b"], [Needle("a-b", "1"), Needle("c-d", "2"), Needle("a-b", "3")])
    assert three.introduction.startswith("Some special magic numbers are hidden")
    assert three.text == (
        "What are all the special magic numbers for c-d, and a-b mentioned in the provided text? "
        "The special magic numbers for c-d, and a-b mentioned in the provided text are"
    )
    assert "".join(three.answer) == " 2, 1, and 3" and three.answer[::2] == [" 2", " 1", " 3"]


def test_haystack_gives_what_fits_and_not_a_sentence_less():
    sentences = ["a" * n for n in (3, 1, 7, 2)]
    haystack = Haystack(sentences, " ", lambda texts: [len(text) for text in texts])
    for size in (-5, 0, 1, 2, 17, 40, 41):
        for seed in range(20):
            taken = haystack.take(Random(seed), size)
            assert len(taken) == 0 or sum(len(s) + 1 for s in taken) <= size
            first = sentences.index(taken[0]) if taken else Random(seed).randrange(4)
            following = sentences[(first + len(taken)) % 4]
            assert taken == [sentences[(first + i) % 4] for i in range(len(taken))]
            assert sum(len(s) + 1 for s in [*taken, following]) > size


def test_needles_are_hidden_in_their_order_at_their_depths():
    needles, sentences = [Needle(f"k{i}", "1") for i in range(5)], [str(i) for i in range(3)]
    mixed, depths = hide(Random(1), needles, sentences)
    assert [s for s in mixed if s in sentences] == sentences
    assert [s for s in mixed if s not in sentences] == [needle.sentence for needle in needles]
    before = [sum(s in sentences for s in mixed[: mixed.index(needle.sentence)]) for needle in needles]
    assert depths == [count / 3 for count in before]


def test_sentences_keep_all_of_the_text():
    text = "One.  Two\nlines? " + "word " * 200 + "end! 3.14 is no end."
    sentences = split_sentences(text)
    assert sentences[:2] == ["One.", "Two lines?"] and sentences[-1] == "3.14 is no end."
    assert " ".join(sentences) == " ".join(text.split())
    assert max(map(len, sentences)) <= LONGEST_SENTENCE
    assert all(len(sentence) <= LONGEST_SENTENCE for sentence in split_sentences("x" * 1000 + " y"))


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


def test_an_answer_names_a_value_once_however_often_it_is_told():
    needles = [Needle("a-b", "1"), Needle("a-b", "2"), Needle("a-b", "1")]
    assert Question.about(["a-b"], needles).values == ("1", "2")


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

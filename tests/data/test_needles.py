from random import Random

from loglinear.data.needles import LONGEST_SENTENCE, Haystack, Needle, Question, draw_key, hide, split_sentences, words


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


def test_an_answer_names_a_value_once_however_often_it_is_told():
    needles = [Needle("a-b", "1"), Needle("a-b", "2"), Needle("a-b", "1")]
    assert Question.about(["a-b"], needles).values == ("1", "2")

"""Needles in a haystack: facts hidden in other text, questions about them, and documents of these to train on.

After RULER (Hsieh et al., arXiv 2404.06654, section 3.1), with the wording of its code. A needle is one sentence with a
key and a value; the haystack is a repeated line of noise, or sentences of real text; a question names one key or
several, and its answer is their values. Keys are two words joined by a hyphen, values are numbers of seven digits.
Words are made of random syllables, where RULER has a list of English ones: 4.7e9 keys, which nobody learns by heart.

What is held out for tests is never in a training document, neither as a key nor as a value: a hash of the key or value
decides on which side it is.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random
from typing import NamedTuple

import numpy as np

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
HELD_OUT = 0.25  # share of all keys, and of all values, that tests use
LONGEST_SENTENCE = 256  # characters; text without full stops is cut between words

KEY_OR_VALUE = re.compile(r" ([a-z]{5}-[a-z]{5}|\d{7})\b(,(?: and)?(?= \d)|\.)?")

SHORTEST = 512  # bytes of the shortest training document with questions
FACTS = 0.8  # share of documents without questions or haystack, half of all bytes: there copying is found out first
TELLING = 62  # bytes of a needle with the separator behind it
SHORTEST_FACTS = 2 * TELLING
FRAME = 384  # bytes: more than an introduction and a question about one key
ROOM = 96  # bytes of a training document for each of its needles: for the needle, and for what is asked about it
MOST = 4  # keys of one question, and values of one key, as RULER has it
SINGLE = 0.6  # share of questions about one key, and of keys with one value
TOLD_TWICE = 0.5  # share of needles that come again: their value can be predicted there, five bytes behind the key


class Needle(NamedTuple):
    """One fact."""

    key: str
    value: str

    @property
    def sentence(self) -> str:
        """What stands in the text."""
        return f"One of the special magic numbers for {self.key} is: {self.value}."


class Question(NamedTuple):
    """Some keys, and their values: keys in the order they are asked, values of a key in the order they appear."""

    keys: tuple[str, ...]
    values: tuple[str, ...]

    @classmethod
    def about(cls, keys: Iterable[str], needles: Sequence[Needle]) -> Question:
        """The question for these keys, answered by needles in the order in which they (first) stand in the text."""
        keys = tuple(keys)
        found = (needle for key in keys for needle in needles if needle.key == key)
        return cls(keys, tuple(needle.value for needle in dict.fromkeys(found)))

    @property
    def introduction(self) -> str:
        """What stands before the haystack."""
        hidden, number = ("A special magic number is", "number")
        if len(self.values) > 1:
            hidden, number = ("Some special magic numbers are", "numbers")
        return (
            f"{hidden} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {number} afterwards."
        )

    @property
    def text(self) -> str:
        """What stands behind the haystack, with the beginning of the answer."""
        keys = _listed(self.keys)
        if len(self.values) == 1:
            asked, answered, is_ = "What is the special magic number", "The special magic number", "is"
        else:
            asked, answered, is_ = "What are all the special magic numbers", "The special magic numbers", "are"
        where = "mentioned in the provided text"
        return f"{asked} for {keys} {where}? {answered} for {keys} {where} {is_}"

    @property
    def answer(self) -> list[str]:
        """The rest of the answer in pieces: value, separator, value ...; without the full stop."""
        pieces = []
        for number, value in enumerate(self.values, start=1):
            pieces += [f" {value}", ", and" if number == len(self.values) - 1 else ","]
        return pieces[:-1]


def _listed(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)}, and {last}" if most else last


def draw_key(rng: Random, *, held_out: bool) -> str:
    """A new key such as 'tabem-zulor', of those for tests or of those for training."""
    return _draw(lambda: f"{_word(rng)}-{_word(rng)}", held_out)


def draw_value(rng: Random, *, held_out: bool) -> str:
    """A new value, a number of seven digits, of those for tests or of those for training."""
    return _draw(lambda: str(rng.randrange(10**6, 10**7)), held_out)


def _word(rng: Random) -> str:
    return "".join(map(rng.choice, (CONSONANTS, VOWELS, CONSONANTS, VOWELS, CONSONANTS)))


def _draw(make: Callable[[], str], held_out: bool) -> str:
    while is_held_out(text := make()) != held_out:
        pass
    return text


def is_held_out(text: str) -> bool:
    """Whether a key or value is for tests. Nothing but the whole of it says so: there is no rule to be learnt."""
    return hashlib.blake2b(text.encode(), digest_size=1).digest()[0] < 256 * HELD_OUT


class Haystack:
    """Sentences in a ring, and the size of each with its separator, in whatever unit `size` counts."""

    def __init__(self, sentences: Sequence[str], separator: str, size: Callable[[str], int]) -> None:
        self.sentences, self.separator = sentences, separator
        self._ends = np.cumsum([size(separator + sentence) for sentence in sentences])

    @classmethod
    def noise(cls, size: Callable[[str], int]) -> Haystack:
        """RULER's line of noise, again and again."""
        return cls([NOISE], "\n", size)

    @classmethod
    def of_texts(cls, texts: Iterable[str], size: Callable[[str], int]) -> Haystack:
        """The sentences of texts, behind one another, with single spaces for all white space.

        Raises ValueError where there is none.
        """
        sentences = [sentence for text in texts for sentence in split_sentences(text)]
        if not sentences:
            raise ValueError("the haystack's text has no sentence")
        return cls(sentences, " ", size)

    def take(self, rng: Random, size: int) -> list[str]:
        """As many consecutive sentences as fit into `size`, from a random one on; behind the last comes the first."""
        count, lap = len(self.sentences), int(self._ends[-1])
        first = rng.randrange(count)
        before = int(self._ends[first - 1]) if first else 0
        laps, rest = divmod(before + size, lap)
        last = laps * count + int(np.searchsorted(self._ends, rest, side="right"))
        return [self.sentences[i % count] for i in range(first, last)]


def split_sentences(text: str) -> list[str]:
    """Sentences of at most LONGEST_SENTENCE characters, white space made single spaces; of a longer word its end."""
    most = LONGEST_SENTENCE - 2
    return re.findall(rf"\S(?:.{{0,{most}}}?[.!?]|.{{0,{most + 1}}})(?= |$)", " ".join(text.split()))


def hide(rng: Random, needles: Sequence[Needle], sentences: Sequence[str]) -> tuple[list[str], list[float]]:
    """Sentences with needles between them in the given order, and each needle's depth: 0 before all, 1 behind all.

    Every place is as likely as any other, for each needle.
    """
    places = sorted(rng.randrange(len(sentences) + 1) for _ in needles)
    mixed = list(sentences)
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        mixed.insert(place, needle.sentence)
    return mixed, [place / max(1, len(sentences)) for place in places]


def needle_documents(count: int, length: int, texts: Iterable[str] = ()) -> Iterator[str]:
    """Training documents of at most `length` bytes; document i is the same for every `count`.

    Four of five are facts alone, told again and again, in 124 bytes or more, with as many bytes in documents of 124 to
    248 as of 248 to 496, and so on. The others have questions: their lengths are drawn log-uniformly from 512 bytes on,
    and filled to within one sentence. Each of these has 1 to (length - 384) / 96 needles in noise or, with equal
    probability, in the sentences of `texts` where these are given; some keys have up to 4 values, and half of the
    needles come twice. Behind them lie questions about 1 to 4 keys each, in random order, until all are asked or the
    room is used.

    Raises ValueError for a count below 1 or a length below 512.
    """
    if count < 1 or length < SHORTEST:
        raise ValueError(f"needle documents must be 1 or more of {SHORTEST} bytes or more, got {count} of {length}")
    texts = list(texts)
    haystacks = [Haystack.noise(_bytes)] + ([Haystack.of_texts(texts, _bytes)] if texts else [])
    for index in range(count):
        rng = Random(f"needle document {index}")
        yield _facts(rng, length) if rng.random() < FACTS else _document(rng, length, haystacks)


def told_again(text: str) -> Iterator[tuple[int, int]]:
    """Where in a document a key or a value comes again, as ranges of characters: what can be known of it.

    With the space before it, which an answer begins with, and what separates values or ends them. The loss counts
    nothing else. New keys and values nobody can predict, and their noise drowns what there is to learn.
    """
    known: set[str] = set()
    for found in KEY_OR_VALUE.finditer(text):
        if found[1] in known:
            yield found.span()
        known.add(found[1])


def _bytes(text: str) -> int:
    return len(text.encode())


def _facts(rng: Random, longest: int) -> str:
    count = round(1 / rng.uniform(1 / longest, 1 / SHORTEST_FACTS)) // TELLING
    told = _needles(rng, round(math.exp(rng.uniform(0, math.log(count // 2)))))  # few rather than many
    told += rng.choices(told, k=count - len(told))
    return "\n".join(needle.sentence for needle in told)


def _document(rng: Random, longest: int, haystacks: Sequence[Haystack]) -> str:
    length = round(math.exp(rng.uniform(math.log(SHORTEST), math.log(longest))))
    haystack = rng.choice(haystacks)
    most = (length - FRAME) // ROOM
    needles = _needles(rng, max(rng.randint(1, most), rng.randint(1, most)))  # rather many than few: more to learn from
    room = length - sum(len(needle.sentence) + 1 for needle in needles)
    questions = _questions(rng, needles, room - FRAME)
    asked = [f"{question.text}{''.join(question.answer)}." for question in questions]
    introduction = questions[0].introduction
    room -= len(introduction) + sum(len(text) + 1 for text in asked) + 1
    mixed, _ = hide(rng, needles, haystack.take(rng, room))
    return "\n".join([introduction, haystack.separator.join(mixed), *asked])


def _needles(rng: Random, count: int) -> list[Needle]:
    needles: list[Needle] = []
    while len(needles) < count:
        key = draw_key(rng, held_out=False)
        for _ in range(_few(rng)):
            needles += [Needle(key, draw_value(rng, held_out=False))] * (2 if rng.random() < TOLD_TWICE else 1)
    needles = needles[:count]
    rng.shuffle(needles)
    return needles


def _few(rng: Random) -> int:
    return 1 if rng.random() < SINGLE else rng.randint(2, MOST)


def _questions(rng: Random, needles: Sequence[Needle], room: int) -> list[Question]:
    """At least one question, and more until the room is used or all keys are asked."""
    keys = list(dict.fromkeys(needle.key for needle in needles))
    rng.shuffle(keys)
    questions: list[Question] = []
    while keys:
        count = _few(rng)
        question = Question.about(keys[:count], needles)
        room -= len(question.text) + len("".join(question.answer)) + 2
        if questions and room < 0:
            break
        questions.append(question)
        keys = keys[count:]
    return questions

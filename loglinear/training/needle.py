"""Needles in a haystack: facts hidden in other text, questions about them, and documents of these to train on.

After RULER (Hsieh et al., arXiv 2404.06654, section 3.1), with the wording of its code. A needle is one sentence with a
key and a value; the haystack is a repeated line of noise, or sentences of real text; a question names one key or
several, and its answer is their values. Keys are two words joined by a hyphen, values are numbers of seven digits.
The words are a thousand made of syllables, where RULER has a list of English ones: a million keys, and a tokenizer can
learn the words by heart, but nobody the keys.

What is held out for tests is never in a training document, neither as a key nor as a value: a hash of the key or value
decides on which side it is.
"""

from __future__ import annotations

import functools
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

WORD_COUNT = 1000
KEY_OR_VALUE = re.compile(r" ([a-z]{5}-[a-z]{5}|\d{7})\b(,(?: and)?(?= \d)|\.)?")

SHORTEST = 200  # bytes of the shortest training document
HAY = "<hay>"  # stands for the haystack until the rest of a document is known
MOST = 4  # keys of one question, and values of one key, as RULER has it
SINGLE = 0.6  # share of questions about one key, and of keys with one value


class Needle(NamedTuple):
    """One fact."""

    key: str
    value: str

    @property
    def sentence(self) -> str:
        """What stands in the text."""
        return f"One of the special magic numbers for {self.key} is: {self.value}."


TELLING = len(Needle("tabem-zulor", "1234567").sentence) + 1  # bytes of any needle, with the separator behind it


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
    return _draw(lambda: f"{rng.choice(words())}-{rng.choice(words())}", held_out)


def draw_value(rng: Random, *, held_out: bool) -> str:
    """A new value, a number of seven digits, of those for tests or of those for training."""
    return _draw(lambda: str(rng.randrange(10**6, 10**7)), held_out)


@functools.cache
def words() -> list[str]:
    """What keys are made of."""
    rng = Random("words of needles")
    found: dict[str, None] = {}
    while len(found) < WORD_COUNT:
        found[_word(rng)] = None
    return list(found)


def _word(rng: Random) -> str:
    return "".join(map(rng.choice, (CONSONANTS, VOWELS, CONSONANTS, VOWELS, CONSONANTS)))


def _draw(make: Callable[[], str], held_out: bool) -> str:
    while is_held_out(text := make()) != held_out:
        pass
    return text


def is_held_out(text: str) -> bool:
    """Whether a key or value is for tests. Nothing but the whole of it says so: there is no rule to be learnt."""
    return hashlib.blake2b(text.encode(), digest_size=1).digest()[0] < 256 * HELD_OUT


Sizes = Callable[[Sequence[str]], Sequence[int]]  # of several texts


class Haystack:
    """Sentences in a ring, and the size of each with its separator, in whatever unit `sizes` counts."""

    def __init__(self, sentences: Sequence[str], separator: str, sizes: Sizes) -> None:
        self.sentences, self.separator = sentences, separator
        self._ends = np.cumsum(sizes([separator + sentence for sentence in sentences]))

    @classmethod
    def noise(cls, sizes: Sizes) -> Haystack:
        """RULER's line of noise, again and again."""
        return cls([NOISE], "\n", sizes)

    @classmethod
    def of_texts(cls, texts: Iterable[str], sizes: Sizes) -> Haystack:
        """The sentences of texts, behind one another, with single spaces for all white space.

        Raises ValueError where there is none.
        """
        sentences = [sentence for text in texts for sentence in split_sentences(text)]
        if not sentences:
            raise ValueError("the haystack's text has no sentence")
        return cls(sentences, " ", sizes)

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
    """Training documents of 200 to `length` bytes; document i is the same for every `count`.

    There are as many bytes in documents of 200 to 400 bytes as of 400 to 800, and so on: what can be found out in short
    ones need not be in long ones. Each has 1 to length / 124 facts, log-uniformly, some keys with up to 4 values; some
    are told again, until a random share of the document is full. They lie in noise or, with equal probability, in the
    sentences of `texts` where these are given. Behind them stand questions about 1 to 4 keys each, until all are asked
    or half of the document is used. It is filled to within one sentence.

    Raises ValueError for a count below 1 or a length below 200.
    """
    if count < 1 or length < SHORTEST:
        raise ValueError(f"needle documents must be 1 or more of {SHORTEST} bytes or more, got {count} of {length}")
    texts = list(texts)
    haystacks = [Haystack.noise(_all_bytes)] + ([Haystack.of_texts(texts, _all_bytes)] if texts else [])
    for index in range(count):
        yield _document(Random(f"needle document {index}"), length, haystacks)


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


def _all_bytes(texts: Sequence[str]) -> list[int]:
    return [_bytes(text) for text in texts]


def _document(rng: Random, longest: int, haystacks: Sequence[Haystack]) -> str:
    length = round(1 / rng.uniform(1 / longest, 1 / SHORTEST))
    haystack = rng.choice(haystacks)
    needles = _facts(rng, round(math.exp(rng.uniform(0, math.log(length // 2 // TELLING)))))
    needles += rng.choices(needles, k=max(1, int(length * rng.random() / TELLING) - len(needles)))
    rng.shuffle(needles)
    room = length - TELLING * len(needles)
    asked = _asked(rng, needles, min(room, length // 2))
    mixed, _ = hide(rng, needles, haystack.take(rng, room - _bytes(asked)))
    return asked.replace(HAY, haystack.separator.join(mixed))


def _facts(rng: Random, count: int) -> list[Needle]:
    facts: list[Needle] = []
    while len(facts) < count:
        key = draw_key(rng, held_out=False)
        facts += [Needle(key, draw_value(rng, held_out=False)) for _ in range(_few(rng))]
    return facts[:count]


def _few(rng: Random) -> int:
    return 1 if rng.random() < SINGLE else rng.randint(2, MOST)


def _asked(rng: Random, needles: Sequence[Needle], room: int) -> str:
    """Questions with their answers, as many as have room, behind an introduction and the place of the haystack."""
    keys = list(dict.fromkeys(needle.key for needle in needles))
    rng.shuffle(keys)
    text = HAY
    while keys:
        count = _few(rng)
        question = Question.about(keys[:count], needles)
        begin = f"{question.introduction}\n" if text == HAY else ""
        more = f"{begin}{text}\n{question.text}{''.join(question.answer)}."
        if _bytes(more) > room:
            break
        text, keys = more, keys[count:]
    return text

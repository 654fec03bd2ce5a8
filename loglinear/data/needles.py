"""Needles in a haystack: facts, the text that hides them, and questions about them.

The tasks follow RULER (Hsieh et al., arXiv 2404.06654, section 3.1) with the wording of its code. A needle is one
sentence with a key and a value. The haystack is a repeated line of noise, or sentences of real text. A question names
one key or several, and its answer is their values. Keys are two words joined by a hyphen, values are numbers of seven
digits. RULER draws words from an English list; here a thousand words are made of syllables. They give a million keys:
a tokenizer can learn the words by heart, but a model cannot learn the keys.

A hash of every key and value decides whether it is for training or for tests. Test keys and values never occur in a
training document.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import NamedTuple

import numpy as np

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
HELD_OUT = 0.25  # share of keys, and of values, for tests
LONGEST_SENTENCE = 256  # characters; text without full stops is cut between words
WORD_COUNT = 1000


class Needle(NamedTuple):
    """One fact: a key and its value."""

    key: str
    value: str

    @property
    def sentence(self) -> str:
        """The sentence in the text."""
        return f"One of the special magic numbers for {self.key} is: {self.value}."


class Question(NamedTuple):
    """Some keys and their values. Keys are in the order of the question, values of a key in that of the text."""

    keys: tuple[str, ...]
    values: tuple[str, ...]

    @classmethod
    def about(cls, keys: Iterable[str], needles: Sequence[Needle]) -> Question:
        """Return the question for these keys. Its values are in the order in which needles first occur in the text."""
        keys = tuple(keys)
        told = (needle for key in keys for needle in needles if needle.key == key)
        return cls(keys, tuple(needle.value for needle in dict.fromkeys(told)))

    @property
    def introduction(self) -> str:
        """The text before the haystack."""
        hidden, number = ("A special magic number is", "number")
        if len(self.values) > 1:
            hidden, number = ("Some special magic numbers are", "numbers")
        return (
            f"{hidden} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {number} afterwards."
        )

    @property
    def text(self) -> str:
        """The text after the haystack, with the beginning of the answer."""
        keys = _listed(self.keys)
        if len(self.values) == 1:
            asked, answered, is_ = "What is the special magic number", "The special magic number", "is"
        else:
            asked, answered, is_ = "What are all the special magic numbers", "The special magic numbers", "are"
        where = "mentioned in the provided text"
        return f"{asked} for {keys} {where}? {answered} for {keys} {where} {is_}"

    @property
    def answer(self) -> list[str]:
        """The rest of the answer in pieces without the full stop: value, separator, value ..."""
        pieces = []
        for number, value in enumerate(self.values, start=1):
            pieces += [f" {value}", ", and" if number == len(self.values) - 1 else ","]
        return pieces[:-1]


def _listed(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)}, and {last}" if most else last


def draw_key(rng: Random, *, held_out: bool) -> str:
    """Return a random key such as 'tabem-zulor', for tests or for training."""
    return _draw(lambda: f"{rng.choice(words())}-{rng.choice(words())}", held_out)


def draw_value(rng: Random, *, held_out: bool) -> str:
    """Return a random value, a number of seven digits, for tests or for training."""
    return _draw(lambda: str(rng.randrange(10**6, 10**7)), held_out)


@functools.cache
def words() -> list[str]:
    """Return the thousand words that keys are made of."""
    rng = Random("words of needles")
    drawn: dict[str, None] = {}
    while len(drawn) < WORD_COUNT:
        drawn[_word(rng)] = None
    return list(drawn)


def _word(rng: Random) -> str:
    return "".join(map(rng.choice, (CONSONANTS, VOWELS, CONSONANTS, VOWELS, CONSONANTS)))


def _draw(make: Callable[[], str], held_out: bool) -> str:
    while is_held_out(text := make()) != held_out:
        pass
    return text


def is_held_out(text: str) -> bool:
    """Return True if a key or value is for tests. A hash of the whole decides, so there is no rule to learn."""
    return hashlib.blake2b(text.encode(), digest_size=1).digest()[0] < 256 * HELD_OUT


Sizes = Callable[[Sequence[str]], Sequence[int]]  # the sizes of several texts


class Haystack:
    """Sentences in a ring. `sizes` gives the size of each with its separator, in its own unit."""

    def __init__(self, sentences: Sequence[str], separator: str, sizes: Sizes) -> None:
        self.sentences, self.separator = sentences, separator
        self._ends = np.cumsum(sizes([separator + sentence for sentence in sentences]))

    @classmethod
    def noise(cls, sizes: Sizes) -> Haystack:
        """Return RULER's repeated line of noise."""
        return cls([NOISE], "\n", sizes)

    @classmethod
    def of_texts(cls, texts: Iterable[str], sizes: Sizes) -> Haystack:
        """Return the sentences of all texts in a row, with single spaces for all white space.

        Raises ValueError if there is no sentence.
        """
        sentences = [sentence for text in texts for sentence in split_sentences(text)]
        if not sentences:
            raise ValueError("the haystack's text has no sentence")
        return cls(sentences, " ", sizes)

    def take(self, rng: Random, size: int) -> list[str]:
        """Return as many consecutive sentences as fit into `size`, from a random one on; the first follows the last."""
        count, lap = len(self.sentences), int(self._ends[-1])
        first = rng.randrange(count)
        before = int(self._ends[first - 1]) if first else 0
        laps, rest = divmod(before + size, lap)
        last = laps * count + int(np.searchsorted(self._ends, rest, side="right"))
        return [self.sentences[i % count] for i in range(first, last)]


def split_sentences(text: str) -> list[str]:
    """Return sentences of at most LONGEST_SENTENCE characters with single spaces. A longer word keeps only its end."""
    most = LONGEST_SENTENCE - 2
    return re.findall(rf"\S(?:.{{0,{most}}}?[.!?]|.{{0,{most + 1}}})(?= |$)", " ".join(text.split()))


def hide(rng: Random, needles: Sequence[Needle], sentences: Sequence[str]) -> tuple[list[str], list[float]]:
    """Return the sentences with the needles between them in their order, and the depth of each needle.

    Depth 0 is before all sentences, 1 after all. Every place is equally likely for each needle.
    """
    places = sorted(rng.randrange(len(sentences) + 1) for _ in needles)
    mixed = list(sentences)
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        mixed.insert(place, needle.sentence)
    return mixed, [place / max(1, len(sentences)) for place in places]

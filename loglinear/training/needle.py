"""Needles in a haystack: facts hidden in other text, questions about them, and training documents of both.

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
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random
from typing import NamedTuple

import numpy as np

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
HELD_OUT = 0.25  # share of keys, and of values, for tests
LONGEST_SENTENCE = 256  # characters; text without full stops is cut between words

WORD_COUNT = 1000
KEY_OR_VALUE = re.compile(r" ([a-z]{5}-[a-z]{5}|\d{7})\b(,(?: and)?(?= \d)|\.)?")

SHORTEST = 200  # bytes of the shortest training document
HAY = "<hay>"  # placeholder for the haystack until the rest of a document is known
MOST = 4  # keys of one question, and values of one key, as in RULER
SINGLE = 0.6  # share of questions about one key, and of keys with one value


class Needle(NamedTuple):
    """One fact: a key and its value."""

    key: str
    value: str

    @property
    def sentence(self) -> str:
        """The sentence in the text."""
        return f"One of the special magic numbers for {self.key} is: {self.value}."


TELLING = len(Needle("tabem-zulor", "1234567").sentence) + 1  # bytes of any needle with its separator


class Question(NamedTuple):
    """Some keys and their values. Keys are in the order of the question, values of a key in that of the text."""

    keys: tuple[str, ...]
    values: tuple[str, ...]

    @classmethod
    def about(cls, keys: Iterable[str], needles: Sequence[Needle]) -> Question:
        """Return the question for these keys. Its values are in the order in which needles first occur in the text."""
        keys = tuple(keys)
        found = (needle for key in keys for needle in needles if needle.key == key)
        return cls(keys, tuple(needle.value for needle in dict.fromkeys(found)))

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


def needle_documents(count: int, length: int, texts: Iterable[str] = ()) -> Iterator[str]:
    """Yield training documents of 200 to `length` bytes. Document i is the same for every `count`.

    Documents of 200 to 400 bytes hold as many bytes in all as those of 400 to 800, and so on: short documents teach
    what long ones need not. Each has 1 to length / 124 facts, log-uniformly, and some keys have up to 4 values. Facts
    are repeated until a random share of the document is full. They are hidden in noise or, if there are `texts`, with
    equal probability in their sentences. Questions about 1 to 4 keys each follow, until all keys are used or half of
    the document is full. A document is shorter than its length by less than one sentence.

    Raises ValueError for a count below 1 or a length below 200.
    """
    if count < 1 or length < SHORTEST:
        raise ValueError(f"needle documents must be 1 or more of {SHORTEST} bytes or more, got {count} of {length}")
    texts = list(texts)
    haystacks = [Haystack.noise(_all_bytes)] + ([Haystack.of_texts(texts, _all_bytes)] if texts else [])
    for index in range(count):
        yield _document(Random(f"needle document {index}"), length, haystacks)


def told_again(text: str) -> Iterator[tuple[int, int]]:
    """Yield the ranges of characters in which a key or a value is repeated. The loss counts nothing else.

    A range includes the space before the key or value, with which an answer begins, and the separator or full stop
    after it. New keys and values are unpredictable, and their noise would drown everything that can be learnt.
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
    """Return an introduction, the placeholder of the haystack, and as many answered questions as fit."""
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

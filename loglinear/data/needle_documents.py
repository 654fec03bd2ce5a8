"""Documents from which a model learns to retrieve: needles, some repeated, and answered questions about them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from random import Random

from loglinear.data.needles import Haystack, Needle, Question, draw_key, draw_value, hide

SHORTEST = 200  # bytes of the shortest document
HAY = "<hay>"  # placeholder for the haystack until the rest of a document is known
MOST = 4  # keys of one question, and values of one key, as in RULER
SINGLE = 0.6  # share of questions about one key, and of keys with one value
TELLING = len(Needle("tabem-zulor", "1234567").sentence) + 1  # bytes of any needle with its separator
KEY_OR_VALUE = re.compile(r" ([a-z]{5}-[a-z]{5}|\d{7})\b(,(?: and)?(?= \d)|\.)?")


def needle_documents(count: int, length: int, texts: Iterable[str] = (), *, first: int = 0) -> Iterator[str]:
    """Yield training documents of 200 to `length` bytes, from number `first` on. The number alone decides a document.

    Lengths are log-uniform. Short documents are many and teach to answer; long ones hold most of the bytes and teach
    to answer from afar. Each has 1 to length / 124 facts, log-uniformly, and some keys have up to 4 values. Facts
    are repeated until a random share of the document is full. They are hidden in noise or, if there are `texts`, with
    equal probability in their sentences. Questions about 1 to 4 keys each follow, until all keys are used or half of
    the document is full. A document is shorter than its length by less than one sentence.

    Raises ValueError for a count below 1 or a length below 200.
    """
    if count < 1 or length < SHORTEST:
        raise ValueError(f"needle documents must be 1 or more of {SHORTEST} bytes or more, got {count} of {length}")
    texts = list(texts)
    haystacks = [Haystack.noise(_all_bytes)] + ([Haystack.of_texts(texts, _all_bytes)] if texts else [])
    for index in range(first, first + count):
        yield _document(Random(f"needle document {index}"), length, haystacks)


def told_again(text: str) -> Iterator[tuple[int, int]]:
    """Yield the ranges of characters in which a key or a value is repeated. The loss counts nothing else.

    A range includes the space before the key or value, with which an answer begins, and the separator or full stop
    after it. New keys and values are unpredictable, and their noise would drown everything that can be learnt.
    """
    known: set[str] = set()
    for match in KEY_OR_VALUE.finditer(text):
        if match[1] in known:
            yield match.span()
        known.add(match[1])


def _bytes(text: str) -> int:
    return len(text.encode())


def _all_bytes(texts: Sequence[str]) -> list[int]:
    return [_bytes(text) for text in texts]


def _document(rng: Random, longest: int, haystacks: Sequence[Haystack]) -> str:
    length = round(_log_uniform(rng, SHORTEST, longest))
    haystack = rng.choice(haystacks)
    needles = _facts(rng, round(_log_uniform(rng, 1, length // 2 // TELLING)))
    needles += rng.choices(needles, k=max(1, int(length * rng.random() / TELLING) - len(needles)))
    rng.shuffle(needles)
    room = length - TELLING * len(needles)
    questions = _questions(rng, needles, min(room, length // 2))
    mixed, _ = hide(rng, needles, haystack.take(rng, room - _bytes(questions)))
    return questions.replace(HAY, haystack.separator.join(mixed))


def _log_uniform(rng: Random, least: float, most: float) -> float:
    return math.exp(rng.uniform(math.log(least), math.log(most)))


def _facts(rng: Random, count: int) -> list[Needle]:
    facts: list[Needle] = []
    while len(facts) < count:
        key = draw_key(rng, held_out=False)
        facts += [Needle(key, draw_value(rng, held_out=False)) for _ in range(_few(rng))]
    return facts[:count]


def _few(rng: Random) -> int:
    return 1 if rng.random() < SINGLE else rng.randint(2, MOST)


def _questions(rng: Random, needles: Sequence[Needle], room: int) -> str:
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

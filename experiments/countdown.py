"""Countdown: reach a target with all given numbers, in attempts written step by step; every answer is verified.

    3 7 25 = 46              the problem
    25-7=18 18*3=54          an attempt that fails
    7*3=21 21+25=46          the attempt that is right and ends the answer

A step takes two of the remaining numbers and leaves their sum, difference or product. The two numbers and the sign are
choices. Their result is not a choice.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from loglinear.data.corpus import Corpus, tokenize
from loglinear.data.sources import Document, name_hash
from loglinear.data.tokenizer import load_tokenizer

NAME = "countdown"
LARGEST = 400  # a random attempt has no larger product
HELD_OUT = 0.05  # share of all problems that no training sees
STEP = re.compile(r"(\d+)([-+*])(\d+)=(\d+)", re.ASCII)
VALIDATION = 512  # answers of the validation
DRAWS = 10_000  # in a row that found nothing; a task has too few problems if its draws so often repeat others


class Problem(NamedTuple):
    """Some numbers, in increasing order, and the target that a solution reaches with all of them."""

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        """The problem in one line, as the model reads it."""
        return f"{' '.join(map(str, self.numbers))} = {self.target}\n"

    @property
    def is_held_out(self) -> bool:
        """True if the problem is for tests alone. Its hash decides, so all seeds hold out the same problems."""
        return name_hash(self.prompt) < HELD_OUT

    @staticmethod
    def from_prompt(prompt: str) -> Problem:
        """Return the problem of `prompt`."""
        numbers, target = prompt.split("=")
        return Problem(tuple(map(int, numbers.split())), int(target))

    def is_solved_by(self, answer: str) -> bool:
        """Return True if the last line of an answer takes all numbers, computes rightly and ends with the target.

        The lines before it are attempts, which may be wrong.
        """
        left = list(self.numbers)
        for written in answer.split("\n")[-1].split(" "):
            step = STEP.fullmatch(written)
            if step is None:
                return False
            a, sign, b, result = step.groups()
            for number in (int(a), int(b)):
                if number not in left:
                    return False
                left.remove(number)
            if _apply(int(a), sign, int(b)) != int(result):
                return False
            left.append(int(result))
        return left == [self.target]


class Countdown(NamedTuple):
    """The sizes of the task: `given` numbers from 1 to `largest`, up to `failures` attempts before the right one."""

    given: int
    largest: int
    failures: int
    answers: int
    """Answers to learn from."""

    @property
    def source(self) -> str:
        """The name of the answers among a recipe's data: countdown:GIVEN:LARGEST:FAILURES:ANSWERS."""
        return ":".join(map(str, (NAME, *self)))

    @staticmethod
    def from_source(source: str) -> Countdown:
        """Return the sizes in a name countdown:GIVEN:LARGEST:FAILURES:ANSWERS. Raises ValueError for another name."""
        name, *numbers = source.split(":")
        if name == NAME and len(numbers) == 4 and all(number.isdecimal() for number in numbers):
            sizes = Countdown(*map(int, numbers))
            if sizes.given >= 2 and sizes.largest >= 2 and sizes.answers >= 1:
                return sizes
        raise ValueError(f"expected answers as {NAME}:GIVEN:LARGEST:FAILURES:ANSWERS, got {source!r}")

    def problems(self, seed: str, *, held_out: bool) -> Iterator[Problem]:
        """Yield random problems without end, all of them held out or none. A seed always yields the same problems.

        Raises ValueError if DRAWS in a row were of the other side: then the task has no such problem.
        """
        return (problem for problem, _ in self._solved(Random(f"{NAME} {seed}"), held_out))

    def test(self, count: int) -> list[Problem]:
        """Return the first `count` different problems that are held out, the same ones in every call.

        Raises ValueError if the task has fewer: DRAWS held-out problems in a row were repetitions.
        """
        different: dict[Problem, None] = {}
        problems, repeated = self.problems("test", held_out=True), 0
        while len(different) < count:
            problem = next(problems)
            repeated = repeated + 1 if problem in different else 0
            if repeated == DRAWS:
                raise ValueError(
                    f"{self.source} has too few different held-out problems, found {len(different)} of {count}: "
                    "expected more or larger numbers"
                )
            different[problem] = None
        return list(different)

    def _solved(self, rng: Random, held_out: bool) -> Iterator[tuple[Problem, str]]:
        missed = 0
        while missed < DRAWS:
            numbers = tuple(sorted(rng.randint(1, self.largest) for _ in range(self.given)))
            attempt, target = random_attempt(rng, numbers)
            problem = Problem(numbers, target)
            missed += 1
            if problem.is_held_out == held_out:
                missed = 0
                yield problem, attempt
        side = "held-out" if held_out else "training"
        raise ValueError(f"{self.source} has no {side} problem: expected more or larger numbers")

    def documents(self, seed: str, *, held_out: bool) -> Iterator[Document]:
        """Yield problems and answers without end. An answer has 0 to `failures` failed attempts, then a right one.

        The loss counts the answer, but not the problem.
        """
        rng = Random(f"{NAME} answers {seed}")
        for index, (problem, attempt) in enumerate(self._solved(rng, held_out)):
            attempts = [attempt]
            for _ in range(rng.randint(0, self.failures)):
                failure, result = random_attempt(rng, problem.numbers)
                if result != problem.target:
                    attempts.insert(0, failure)
            text = problem.prompt + "\n".join(attempts)
            yield Document(f"{NAME} {index}", text, ((len(problem.prompt), len(text)),))

    def corpora(self, seed: int) -> tuple[Corpus, Corpus]:
        """Return the answers of a seed as byte tokens, and VALIDATION other answers, to held-out problems."""
        return self._corpus(f"{seed}", self.answers, held_out=False), self._corpus("", VALIDATION, held_out=True)

    def _corpus(self, seed: str, count: int, *, held_out: bool) -> Corpus:
        tokenizer = load_tokenizer("bytes")
        documents = self.documents(seed, held_out=held_out)
        corpus = tokenize((next(documents) for _ in range(count)), tokenizer)
        # A range of characters leaves out the end token. A model that has not learnt this token never ends an answer.
        return dataclasses.replace(corpus, learnt=corpus.learnt | (corpus.tokens == tokenizer.eos_token_id))


def random_attempt(rng: Random, numbers: tuple[int, ...]) -> tuple[str, int]:
    """Return the steps of a random attempt in one line, and their last result. No product is larger than LARGEST."""
    left, steps = list(numbers), []
    while len(left) > 1:
        a, b = sorted(rng.sample(range(len(left)), 2), key=lambda place: -left[place])
        larger, smaller = left[a], left[b]
        signs = ["+"] + ["-"] * (larger > smaller) + ["*"] * (larger * smaller <= LARGEST)
        sign = rng.choice(signs)
        result = _apply(larger, sign, smaller)
        steps.append(f"{larger}{sign}{smaller}={result}")
        left = [number for place, number in enumerate(left) if place not in (a, b)] + [result]
    return " ".join(steps), left[0]


def _apply(a: int, sign: str, b: int) -> int:
    return a + b if sign == "+" else a - b if sign == "-" else a * b

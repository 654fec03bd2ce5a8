"""Countdown: what an answer must be, and what the answers to learn from are."""

import itertools
from random import Random

import numpy as np
import pytest

from experiments.countdown import LARGEST, VALIDATION, Countdown, Problem, random_attempt
from loglinear.data.tokenizer import load_tokenizer

PROBLEM = Problem((3, 7, 25), 46)
TASK = Countdown(given=3, largest=12, failures=2, answers=60)


@pytest.mark.parametrize(
    "answer",
    ["7*3=21 25+21=46", "3*7=21 21+25=46", "25-7=18 18*3=54\n7*3=21 25+21=46", "anything\n7*3=21 21+25=46"],
)
def test_an_answer_is_right_if_its_last_line_is(answer):
    assert PROBLEM.is_solved_by(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "46",
        "7*3=21 25+21=46\n",  # ends with an attempt that is not there
        "7*3=21 25+21=46 ",
        "7*3=21",  # a number is left
        "25+21=46",  # 21 is no number yet
        "7*3=21 25+21=45",
        "7*3=22 25+22=47",
        "7*3=24 22+24=46",  # 22 is not given
        "7*3=25 25+21=46",  # computes wrongly
        "25+21=46 7*3=21",
        "7*3=21 25+21=46 46-0=46",
        "7*3=21 25+21=46\n25-7=18 18*3=54",
        "7*3=21 25+21=46 and more",
        "3*7=21 21+25=4٦",
    ],
)
def test_any_other_answer_is_wrong(answer):
    assert not PROBLEM.is_solved_by(answer)


def test_a_number_is_taken_as_often_as_it_is_given():
    assert Problem((5, 5, 2), 50).is_solved_by("5*5=25 25*2=50")
    assert not Problem((5, 4, 2), 50).is_solved_by("5*5=25 25*2=50")
    assert Problem((2, 2, 4), 8).is_solved_by("2+2=4 4+4=8")


def test_a_difference_has_its_sign():
    assert Problem((3, 5, 9), 7).is_solved_by("9-5=4 4+3=7")
    assert not Problem((3, 5, 9), 11).is_solved_by("3-5=2 9+2=11")


def test_a_prompt_is_its_problem():
    assert PROBLEM.prompt == "3 7 25 = 46\n" and Problem.from_prompt(PROBLEM.prompt) == PROBLEM


@pytest.mark.parametrize("count", [2, 3, 5])
def test_random_attempts_are_right_for_their_own_result(count):
    rng = Random(count)
    for _ in range(200):
        numbers = tuple(sorted(rng.randint(1, 99) for _ in range(count)))
        attempt, result = random_attempt(rng, numbers)
        assert Problem(numbers, result).is_solved_by(attempt)
        assert result >= 1 and all(int(step.split("=")[1]) <= 5 * LARGEST for step in attempt.split(" "))


def test_held_out_problems_are_in_no_training():
    of_training = itertools.islice(TASK.problems("0", held_out=False), 2000)
    of_tests = list(itertools.islice(TASK.problems("tests", held_out=True), 200))
    assert not {*of_training} & {*of_tests} and len({*of_tests}) > 10
    assert of_tests[:20] == list(itertools.islice(TASK.problems("tests", held_out=True), 20))
    assert of_tests[:20] != list(itertools.islice(TASK.problems("others", held_out=True), 20))
    asked = TASK.test(40)
    assert len({*asked}) == 40 and asked[:15] == TASK.test(15) and all(problem.is_held_out for problem in asked)


def test_more_problems_than_there_are_are_refused():
    few = Countdown(given=2, largest=5, failures=0, answers=1)
    # Two numbers have a sum, a product, and a difference if they differ.
    every = {Problem((a, b), t) for a in range(1, 6) for b in range(a, 6) for t in (a + b, a * b, b - a) if t}
    held_out = {problem for problem in every if problem.is_held_out}
    assert len(held_out) == 2 and {*few.test(2)} == held_out
    with pytest.raises(ValueError, match="countdown:2:5:0:1 has too few different held-out problems, found 2 of 50"):
        few.test(50)


def test_a_task_without_a_problem_of_one_side_is_refused():
    one = Countdown(given=2, largest=2, failures=0, answers=1)
    held_out = {problem.is_held_out for problem in itertools.islice(one.problems("0", held_out=False), 50)}
    assert held_out == {False}
    with pytest.raises(ValueError, match="countdown:2:2:0:1 has no held-out problem"):
        next(one.problems("0", held_out=True))
    with pytest.raises(ValueError, match="countdown:2:2:0:1 has no held-out problem"):
        one.test(1)


def test_answers_to_learn_from_end_right_after_attempts_that_fail():
    attempts = []
    for document in itertools.islice(TASK.documents("0", held_out=False), 300):
        first, _, answer = document.text.partition("\n")
        problem = Problem.from_prompt(f"{first}\n")
        lines = answer.split("\n")
        assert problem.is_solved_by(answer) and not any(map(problem.is_solved_by, lines[:-1]))
        attempts.append(len(lines))
    assert {*attempts} == {1, 2, 3} and min(attempts.count(number) for number in (1, 2, 3)) > 60


def test_the_loss_counts_the_answers_and_their_ends():
    training, validation = TASK.corpora(0)
    tokenizer = load_tokenizer("bytes")
    assert len(training.names) == 60 and len(validation.names) == VALIDATION
    for number in range(60):
        tokens = training.document(number)
        learnt = training.learnt[training.offsets_D[number] : training.offsets_D[number + 1]]
        text = tokenizer.decode(tokens[1:-1])
        prompt = len(text.partition("\n")[0]) + 1
        assert tokens[-1] == tokenizer.eos_token_id and learnt[-1]
        assert np.array_equal(learnt, np.arange(len(tokens)) > prompt)
    prints = [TASK.corpora(seed)[0].fingerprint for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2] and TASK.corpora(1)[1].fingerprint == validation.fingerprint


def test_the_name_of_the_answers_holds_their_sizes():
    assert TASK.source == "countdown:3:12:2:60" and Countdown.from_source(TASK.source) == TASK
    for wrong in ("countdown:3:12:2", "stdlib", "countdown:1:12:2:60", "countdown:3:12:2:0", "countdown:3:x:2:60"):
        with pytest.raises(ValueError, match=f"countdown:GIVEN:LARGEST:FAILURES:ANSWERS, got '{wrong}'"):
            Countdown.from_source(wrong)

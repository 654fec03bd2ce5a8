"""Needle-in-a-haystack retrieval after RULER (Hsieh et al., arXiv 2404.06654), by teacher forcing.

There are five of RULER's tasks, with its names without `niah_`. An example with its answer is shorter than its length
by less than one sentence. The places of its needles are uniform. Its keys and values never occur in training documents
(`loglinear.data.needles`).

The model reads the true answer, and every token of it counts as right if it is the likeliest after the true tokens
before it. One forward pass scores many examples. If all tokens are right, greedy decoding writes exactly this answer.
A value is found if all its tokens are right; the accuracy is the share of values found. The values of several keys are
in the order of the question's keys, those of one key in the order of the text.

RULER searches the values in the model's own text, in any order. For one value both scores are the same if the model
begins with it. For several, this score does not count errors in the values before.

# N examples, V values of one example
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from loglinear.data.needles import LONGEST_SENTENCE, Haystack, Needle, Question, Sizes, draw_key, draw_value, hide
from loglinear.data.tokenizer import encode_documents, first_tokens
from loglinear.evaluation.packed import LOGIT_ROWS, logits_of, read, rows
from loglinear.evaluation.stepped import stepped_hits

ROW_TOKENS = 65_536  # tokens of one forward pass, or one example where that is longer
DEPTH_BINS = 10


class Task(NamedTuple):
    """The number of needles in an example, and of keys in its question."""

    keys: int = 1
    values: int = 1  # of each key
    asked: int = 1  # keys in the question


TASKS = {
    "single_1": Task(),  # always in noise
    "single_2": Task(),
    "multikey_1": Task(keys=4),
    "multivalue": Task(values=4),
    "multiquery": Task(keys=4, asked=4),
}
IN_NOISE, IN_TEXT = "single_1", "single_2"  # they differ only in the haystack


class Example(NamedTuple):
    """A text with a question, the pieces of the answer (value, separator, value ...), and where each value is told."""

    prompt: str
    answer: list[str]
    depths: list[float]  # 0 to 1, of each value
    sentences: list[str]  # the needle of each value


def token_counter(tokenizer: PreTrainedTokenizerBase) -> Sizes:
    """Return the function that counts the tokens of each of several texts, without special tokens."""
    return lambda texts: [len(tokens) for tokens in _tokens(tokenizer, texts)]


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[np.ndarray]:
    first = len(first_tokens(tokenizer))
    return (tokens[first:-1] for tokens, _ in encode_documents(tokenizer, ((text, None) for text in texts)))


def needle_examples(
    task: str, count: int, *, length: int, haystack: Haystack, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> list[Example]:
    """Return examples of at most `length` tokens with their answer, shorter by less than one sentence.

    Equal arguments give equal examples, and a larger count adds examples. The haystack must count tokens of this
    tokenizer (`token_counter`). A tokenizer that joins characters of neighbouring sentences makes examples shorter.

    Raises ValueError for an unknown task, and for a length without room for the needles and the question.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    make = partial(_example, task, length, haystack, tokenizer)
    return [make(Random(f"needle test {seed} {task} {length} {index}")) for index in range(count)]


def _example(task: str, length: int, haystack: Haystack, tokenizer: PreTrainedTokenizerBase, rng: Random) -> Example:
    sizes = TASKS[task]
    keys = _different(partial(draw_key, rng, held_out=True), sizes.keys)
    values = _different(partial(draw_value, rng, held_out=True), sizes.keys * sizes.values)
    needles = [Needle(key, value) for key, value in zip(keys * sizes.values, values, strict=True)]
    rng.shuffle(needles)
    question = Question.about(rng.sample(keys, sizes.asked), needles)
    begin, end, answer = f"{question.introduction}\n", f"\n{question.text}", "".join(question.answer)
    fixed = [begin, end, answer, *(haystack.separator + needle.sentence for needle in needles)]
    room = length - len(first_tokens(tokenizer)) - sum(token_counter(tokenizer)(fixed))
    sentences = haystack.take(rng, room)
    if not sentences:
        enough = length - room + LONGEST_SENTENCE  # bytes: at least as many as tokens
        raise ValueError(f"length must leave room for a sentence in {task}: {enough} tokens are enough, got {length}")
    mixed, depths = hide(rng, needles, sentences)
    told = {needle.value: (depth, needle.sentence) for needle, depth in zip(needles, depths, strict=True)}
    asked = [told[value] for value in question.values]
    prompt = begin + haystack.separator.join(mixed) + end
    return Example(prompt, question.answer, [depth for depth, _ in asked], [sentence for _, sentence in asked])


ExampleSets = dict[tuple[str, int], list[Example]]  # by task and length


def example_sets(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    lengths: Sequence[int],
    count: int,
    tasks: Sequence[str] | None = None,
    seed: int = 0,
) -> ExampleSets:
    """Return `needle_examples` of every task (default: all) at every length, the shortest first.

    Needles are hidden in the sentences of `texts`. Without texts they are hidden in noise, and single_2 is left out.

    Raises ValueError if single_2 is named without a text, and as `needle_examples` does.
    """
    if IN_TEXT in (tasks or ()) and not texts:
        raise ValueError(f"task {IN_TEXT} hides its needle in text: give --data")
    sizes = token_counter(tokenizer)
    noise = Haystack.noise(sizes)
    text = Haystack.of_texts(texts, sizes) if texts else noise
    return {
        (task, length): needle_examples(
            task, count, length=length, haystack=noise if task == IN_NOISE else text, tokenizer=tokenizer, seed=seed
        )
        for task in tasks or TASKS
        for length in sorted(set(lengths))
        if texts or task != IN_TEXT
    }


def _different(draw: Callable[[], str], count: int) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw()] = None
    return list(drawn)


@dataclass(frozen=True)
class NeedleScores:
    """The values that a model found, in examples with equally many values."""

    found_NV: np.ndarray  # bool
    exact_N: np.ndarray  # bool: the whole answer with its separators
    depths_NV: np.ndarray

    @property
    def accuracy(self) -> float:
        """The share of values found."""
        return float(self.found_NV.mean())

    @property
    def standard_error(self) -> float:
        """The standard error of the accuracy p over examples. For one value each it is sqrt(p (1 - p) / N)."""
        return float(self.found_NV.mean(1).std() / math.sqrt(len(self.found_NV)))

    @property
    def exact_match(self) -> float:
        """The share of examples that greedy decoding answers word for word."""
        return float(self.exact_N.mean())

    def by_depth(self) -> list[dict[str, Any]]:
        """Return accuracy, binomial error and number of values for each tenth of the haystack with values."""
        bins_NV = np.minimum((self.depths_NV * DEPTH_BINS).astype(int), DEPTH_BINS - 1)
        parts = []
        for number in np.unique(bins_NV).tolist():
            found_V = self.found_NV[bins_NV == number]
            parts.append(
                {
                    "depth": (number + 0.5) / DEPTH_BINS,
                    "accuracy": float(found_V.mean()),
                    "standard_error": float(found_V.std() / math.sqrt(len(found_V))),
                    "values": len(found_V),
                }
            )
        return parts

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "examples": len(self.found_NV),
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
            "exact_match": self.exact_match,
            "by_depth": self.by_depth(),
        }


def evaluate_needle(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    row_tokens: int = ROW_TOKENS,
    decode: bool = False,
    label: str | None = "needles",
) -> NeedleScores:
    """Return the scores of a model on examples.

    A packed forward pass reads as many examples as fit into `row_tokens`. Logits exist only for the answers. With
    `decode` a forward pass reads the prompts, and decode steps read the answers, as `generate` does: a routed model
    then reads the buckets of its decode_top_k. `label` names the progress bar; None means no bar.
    """
    find = stepped_hits if decode else answer_hits
    found_NV, exact_N = [], []
    encoded = _encode(tokenizer, examples)
    with tqdm(total=len(examples), desc=label, unit=" examples", disable=label is None, leave=False) as bar:
        for row in rows(encoded, _Encoded.size, row_tokens):
            hits = find(model, [(example.prompt, example.answer) for example in row])
            for example, hit in zip(row, hits, strict=True):
                pieces = np.logical_and.reduceat(hit, example.starts)
                found_NV.append(pieces[::2])  # every other piece is a separator
                exact_N.append(pieces.all())
            bar.update(len(row))
    depths_NV = np.array([example.depths for example in examples])
    return NeedleScores(np.array(found_NV), np.array(exact_N), depths_NV)


def evaluate_sets(
    model: Any, tokenizer: PreTrainedTokenizerBase, sets: ExampleSets, *, decode: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Return, by task, `NeedleScores.to_dict` with its length for every length in order; see `evaluate_needle`.

    The shortest examples of all tasks come first, because the longest take most of the time. After each length a line
    on standard error has its accuracies.
    """
    results: dict[str, list[dict[str, Any]]] = {task: [] for task, _ in sets}
    for length in sorted({length for _, length in sets}):
        own = {task: examples for (task, of), examples in sets.items() if of == length}
        for task, examples in own.items():
            scores = evaluate_needle(model, tokenizer, examples, decode=decode, label=f"{task}, {length:,} tokens")
            results[task].append({"length": length, **scores.to_dict()})
        found = ", ".join(f"{task} {results[task][-1]['accuracy']:.3f}" for task in own)
        print(f"{length:,} tokens: {found}", file=sys.stderr)
    return results


class _Encoded(NamedTuple):
    prompt: np.ndarray
    answer: np.ndarray
    starts: np.ndarray  # the first tokens of the pieces of the answer

    def size(self) -> int:
        return len(self.prompt) + len(self.answer)


def _encode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> Iterator[_Encoded]:
    prompts = encode_documents(tokenizer, ((example.prompt, None) for example in examples))
    for example, (prompt, _) in zip(examples, prompts, strict=True):
        pieces = list(_tokens(tokenizer, example.answer))
        starts = np.cumsum([0, *map(len, pieces[:-1])])
        yield _Encoded(prompt[:-1], np.concatenate(pieces), starts)


@torch.no_grad()
def answer_hits(model: Any, examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Return, for each (prompt, answer) of token ids, a mask of the tokens of the answer that are the likeliest.

    Each token is predicted from the true tokens before it, in one forward pass. Greedy decoding of a prompt begins with
    the answer if and only if the whole mask is True.
    """
    hidden, targets = read(model, [np.concatenate(example) for example in examples])
    marks = [np.repeat([False, True], [len(prompt), len(answer)]) for prompt, answer in examples]
    chosen = torch.from_numpy(np.concatenate(marks)[1:]).to(hidden.device)
    likeliest: Tensor = torch.cat([logits_of(model, part).argmax(-1) for part in hidden[chosen].split(LOGIT_ROWS)])
    hits = (likeliest == targets[chosen]).cpu().numpy()
    return np.split(hits, np.cumsum([len(answer) for _, answer in examples])[:-1])

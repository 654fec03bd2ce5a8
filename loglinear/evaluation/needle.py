"""Needle-in-a-haystack retrieval, after RULER (Hsieh et al., arXiv 2404.06654), by teacher forcing.

Five of RULER's tasks, by its names without `niah_`. An example is as long as it is asked to be, to within one sentence,
with its answer; the places of its needles are drawn uniformly. Its keys and values are none of those in training
documents (`loglinear.training.needle`).

A model answers by the likeliest token each time. All tokens of the answer are read at once, behind the true ones, so
one forward pass scores many examples: where each is the likeliest, greedy decoding writes just this answer. A value
counts as found where all its tokens are the likeliest, with what stands before it in the answer given; the accuracy is
the share of values found. Several values are asked for in the order of the question's keys, those of one key in the
order in which they appear. RULER looks for the values in what the model writes, in any order: for one value the same,
where the model begins with it; of several, ours takes no account of mistakes in those before.

# N examples, V values of one example
"""

from __future__ import annotations

import math
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

from loglinear.evaluation.packed import LOGIT_ROWS, read, rows
from loglinear.training.needle import LONGEST_SENTENCE, Haystack, Needle, Question, Sizes, draw_key, draw_value, hide
from loglinear.training.tokenizer import encode_documents, first_tokens

ROW_TOKENS = 65_536  # tokens of one forward pass, or one example where that is longer
DEPTH_BINS = 10


class Task(NamedTuple):
    """How many needles an example has, and how many keys are asked."""

    keys: int = 1
    values: int = 1  # of each key
    asked: int = 1  # keys


TASKS = {
    "single_1": Task(),  # in noise, whatever text there is
    "single_2": Task(),
    "multikey_1": Task(keys=4),
    "multivalue": Task(values=4),
    "multiquery": Task(keys=4, asked=4),
}
IN_NOISE, IN_TEXT = "single_1", "single_2"  # the same but for the haystack


class Example(NamedTuple):
    """One text with a question, the answer's pieces (value, separator, value ...) and the depths of its values."""

    prompt: str
    answer: list[str]
    depths: list[float]  # 0 to 1


def token_counter(tokenizer: PreTrainedTokenizerBase) -> Sizes:
    """The function that counts the tokens of each of several texts, without special ones."""
    return lambda texts: [len(tokens) for tokens in _tokens(tokenizer, texts)]


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[np.ndarray]:
    first = len(first_tokens(tokenizer))
    return (tokens[first:-1] for tokens, _ in encode_documents(tokenizer, ((text, None) for text in texts)))


def needle_examples(
    task: str, count: int, *, length: int, haystack: Haystack, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> list[Example]:
    """Examples of at most `length` tokens with their answer, less than one sentence shorter.

    Equal arguments give equal examples, and a larger count more of the same. The haystack must count tokens of this
    tokenizer (`token_counter`); with one that joins characters of neighbouring sentences examples become shorter.

    Raises ValueError for an unknown task, and for a length without room for its needles and question.
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
        enough = length - room + LONGEST_SENTENCE  # bytes, which are tokens or more than those
        raise ValueError(f"length must leave room for a sentence in {task}: {enough} tokens are enough, got {length}")
    mixed, depths = hide(rng, needles, sentences)
    depth_of = {needle.value: depth for needle, depth in zip(needles, depths, strict=True)}
    prompt = begin + haystack.separator.join(mixed) + end
    return Example(prompt, question.answer, [depth_of[value] for value in question.values])


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
    """`needle_examples` of every task (default: all) at every length, from the shortest on.

    Needles are hidden in the sentences of `texts`; where there are none, in noise, and single_2 is left out.

    Raises ValueError for single_2 without a text, and as `needle_examples` does.
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
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


@dataclass(frozen=True)
class NeedleScores:
    """What one model found, in examples with equally many values."""

    found_NV: np.ndarray  # bool
    exact_N: np.ndarray  # bool: the whole answer, separators as well
    depths_NV: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of values found."""
        return float(self.found_NV.mean())

    @property
    def standard_error(self) -> float:
        """Of the accuracy p, over examples: with one value each the binomial sqrt(p (1 - p) / N)."""
        return float(self.found_NV.mean(1).std() / math.sqrt(len(self.found_NV)))

    @property
    def exact_match(self) -> float:
        """Share of examples that greedy decoding answers in full, word for word."""
        return float(self.exact_N.mean())

    def by_depth(self) -> list[dict[str, Any]]:
        """Accuracy, its binomial error and the number of values for each tenth of the haystack that has any."""
        bins_NV = np.minimum((self.depths_NV * DEPTH_BINS).astype(int), DEPTH_BINS - 1)
        parts = []
        for number in np.unique(bins_NV).tolist():
            found = self.found_NV[bins_NV == number]
            parts.append(
                {
                    "depth": (number + 0.5) / DEPTH_BINS,
                    "accuracy": float(found.mean()),
                    "standard_error": float(found.std() / math.sqrt(len(found))),
                    "values": len(found),
                }
            )
        return parts

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
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
    label: str | None = "needles",
) -> NeedleScores:
    """Score examples, as many in one packed forward pass as `row_tokens` takes; logits exist for the answers alone.

    `label` is what the progress bar says; None: no bar.
    """
    found_NV, exact_N = [], []
    encoded = _encode(tokenizer, examples)
    with tqdm(total=len(examples), desc=label, unit=" examples", disable=label is None, leave=False) as bar:
        for row in rows(encoded, _Encoded.size, row_tokens):
            hits = answer_hits(model, [(example.prompt, example.answer) for example in row])
            for example, hit in zip(row, hits, strict=True):
                pieces = np.logical_and.reduceat(hit, example.starts)
                found_NV.append(pieces[::2])  # every other piece is a separator
                exact_N.append(pieces.all())
            bar.update(len(row))
    depths_NV = np.array([example.depths for example in examples])
    return NeedleScores(np.array(found_NV), np.array(exact_N), depths_NV)


def evaluate_sets(model: Any, tokenizer: PreTrainedTokenizerBase, sets: ExampleSets) -> dict[str, list[dict[str, Any]]]:
    """`NeedleScores.to_dict` with its length, by task and in the order of the lengths."""
    results: dict[str, list[dict[str, Any]]] = {task: [] for task, _ in sets}
    for (task, length), examples in sets.items():
        scores = evaluate_needle(model, tokenizer, examples, label=f"{task}, {length:,} tokens")
        results[task].append({"length": length, **scores.to_dict()})
    return results


class _Encoded(NamedTuple):
    prompt: np.ndarray
    answer: np.ndarray
    starts: np.ndarray  # where the answer's pieces begin in it

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
    """For each (prompt, answer), both token ids, which tokens of the answer are the likeliest behind the true ones.

    One forward pass. Greedy decoding of the prompt begins with the answer exactly where all of them are.
    """
    hidden, targets = read(model, [np.concatenate(example) for example in examples])
    marks = [np.repeat([False, True], [len(prompt), len(answer)]) for prompt, answer in examples]
    chosen = torch.from_numpy(np.concatenate(marks)[1:]).to(hidden.device)
    head = model.get_output_embeddings()
    likeliest: Tensor = torch.cat([head(part).argmax(-1) for part in hidden[chosen].split(LOGIT_ROWS)])
    hits = (likeliest == targets[chosen]).cpu().numpy()
    return np.split(hits, np.cumsum([len(answer) for _, answer in examples])[:-1])

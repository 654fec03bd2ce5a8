"""The task has the published statistics, and a right answer."""

import numpy as np
import pytest
import torch

from loglinear.evaluation.mqar.examples import recall_examples
from loglinear.training.data import IGNORED


def drawn_slots(slots: int, pairs: int, alpha: float, examples: int, seed: int) -> np.ndarray:
    """[examples, pairs]: the definition, one draw after the other."""
    random, p = np.random.default_rng(seed), alpha * np.arange(1, slots + 1) ** (alpha - 1.0)
    drawn = np.empty((examples, pairs), dtype=int)
    for row in drawn:
        left = p.copy()
        for i in range(pairs):
            row[i] = random.choice(slots, p=left / left.sum())
            left[row[i]] = 0
    return drawn


@pytest.mark.parametrize("length, pairs, vocab", [(256, 64, 8192), (64, 4, 40), (16, 1, 9), (20, 5, 12)])
def test_every_query_is_a_key_and_its_answer_the_value_that_followed_it(length, pairs, vocab):
    tokens, labels = recall_examples(200, length=length, pairs=pairs, vocab_size=vocab, seed=0)
    assert tokens.shape == labels.shape == (200, length)
    assert int(tokens.min()) >= 0 and int(tokens.max()) < vocab
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        pair_of = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(pair_of) == len(set(pair_of.values())) == pairs
        assert all(1 <= key < vocab // 2 <= value for key, value in pair_of.items())
        places = [t for t, answer in enumerate(answers) if answer != IGNORED]
        asked = [row[t - 1] for t in places]
        assert sorted(asked) == sorted(pair_of) and min(places) > 2 * pairs and all(t % 2 for t in places)
        assert [answers[t] for t in places] == [pair_of[key] for key in asked]


def test_queries_lie_where_the_power_law_puts_them():
    """How often each slot asks for each key, beside the definition: within five standard errors."""
    examples, length, pairs, alpha = 6000, 32, 4, 0.01
    slots = (length - 2 * pairs) // 2
    tokens, labels = recall_examples(examples, length=length, pairs=pairs, vocab_size=100, alpha=alpha, seed=1)
    keys = tokens[:, 0 : 2 * pairs : 2]
    asked = torch.where(labels[:, 2 * pairs + 1 :: 2] != IGNORED, tokens[:, 2 * pairs :: 2], -1)
    found = (keys[:, :, None] == asked[:, None, :]).double().mean(0).numpy()
    drawn = drawn_slots(slots, pairs, alpha, examples, seed=2)
    expected = (drawn[:, :, None] == np.arange(slots)).mean(0)
    error = np.sqrt((expected * (1 - expected) + 1e-4) * 2 / examples)
    assert (np.abs(found - expected) < 5 * error).all()
    assert found[0, 0] > 3 * found[0, -1]


def test_a_seed_gives_the_same_examples_and_another_one_others():
    first, again = (recall_examples(5000, length=16, pairs=2, seed=3) for _ in range(2))
    other = recall_examples(5000, length=16, pairs=2, seed=4)
    assert torch.equal(first.tokens_NT, again.tokens_NT) and torch.equal(first.labels_NT, again.labels_NT)
    assert not torch.equal(first.tokens_NT, other.tokens_NT)
    assert len(first.tokens_NT.unique(dim=0)) == 5000


@pytest.mark.parametrize(
    "sizes, text",
    [
        (dict(length=15, pairs=2), "length must be even and at least 4 times the 2 pairs, got 15"),
        (dict(length=14, pairs=4), "length must be even and at least 4 times the 4 pairs, got 14"),
        (dict(length=64, pairs=8, vocab_size=16), "vocab_size must be more than twice the 8 pairs, got 16"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_named(sizes, text):
    with pytest.raises(ValueError, match=text):
        recall_examples(1, seed=0, **sizes)

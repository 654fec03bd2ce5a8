"""The task has the published statistics, and a right answer."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from loglinear.data.packing import IGNORED
from loglinear.evaluation.mqar.cells import get_task
from loglinear.evaluation.mqar.examples import recall_examples
from loglinear.fenwick import level

JITTERED = get_task("jittered").override(protocol="zoology")
PAGE = Path(__file__).parents[3] / "docs/results/recall.md"


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
    tokens, labels, _ = recall_examples(200, length=length, pairs=pairs, vocab_size=vocab, seed=0)
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
    """Each slot asks for each key as often as the definition says, within five standard errors."""
    examples, length, pairs, alpha = 6000, 32, 4, 0.01
    slots = (length - 2 * pairs) // 2
    tokens, labels, _ = recall_examples(examples, length=length, pairs=pairs, vocab_size=100, alpha=alpha, seed=1)
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


def buckets(pairs: int, length: int, start: int = 0) -> set[int]:
    """The numbers of buckets in which a query may see the pairs."""
    places = range(start, start + 2 * pairs)
    return {len({level(t, s) for s in places}) for t in range(start + 2 * pairs, start + length)}


@pytest.mark.parametrize(
    ("length", "pairs"),
    [(64, 4), (128, 8), *((256, pairs) for pairs in (4, 8, 16, 32, 64)), (512, 64), (1024, 256)],
    ids=str,
)
def test_every_query_of_a_standard_example_sees_all_pairs_in_one_bucket(length, pairs):
    """level(t, s) = bit_length(t) for all s < 2 P <= t: t has the highest bit of t XOR s."""
    assert buckets(pairs, length) == {1}
    assert all(level(t, s) == t.bit_length() for t in range(2 * pairs, length) for s in range(2 * pairs))


def test_other_numbers_of_pairs_and_other_starts_have_several_buckets():
    assert buckets(48, 256) == {1, 2}
    assert max(buckets(64, 256, start=37)) > 2
    for pairs, length, _ in JITTERED.settings(training=True):
        assert buckets(pairs, length) == {1, 2}


@pytest.mark.parametrize("setting", JITTERED.settings(training=False), ids=str)
def test_the_page_says_how_many_buckets_hold_the_pairs_of_jittered_examples(setting):
    (pairs, length, _), N = setting, 300
    _, labels, starts = recall_examples(N, length=length, pairs=pairs, seed=5, starts=JITTERED.starts)
    query = starts[:, None] + (labels != IGNORED).nonzero()[:, 1].view(N, pairs) - 1
    place = starts[:, None] + torch.arange(2 * pairs)
    levels = torch.frexp((query[:, :, None] ^ place[:, None, :]).double()).exponent.long()  # the bit length
    counts = torch.zeros(N, pairs, 12).scatter(2, levels, 1.0).sum(2)
    row = re.search(rf"\n\| {pairs} \| {length:,} \| (.*) \| (.*) % \|\n", PAGE.read_text())
    assert float(row[1]) == pytest.approx(float(counts.mean()), abs=0.1)
    assert float(row[2]) == pytest.approx(float((counts > 1).float().mean() * 100), abs=6)


def test_starts_are_uniform_and_leave_the_tokens_as_they_are():
    plain, jittered, again = (recall_examples(5000, length=16, pairs=2, seed=3, starts=n) for n in (1, 16, 16))
    assert plain.starts_N is None and torch.equal(jittered.starts_N, again.starts_N)
    assert torch.equal(plain.tokens_NT, jittered.tokens_NT) and torch.equal(plain.labels_NT, jittered.labels_NT)
    counts = jittered.starts_N.bincount()
    assert len(counts) == 16 and (counts - 312.5).abs().max() < 5 * 312.5**0.5


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

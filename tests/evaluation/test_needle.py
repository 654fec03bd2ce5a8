import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loglinear.data.needles import NOISE, Haystack, is_held_out
from loglinear.data.tokenizer import encode_document
from loglinear.evaluation.needle import (
    TASKS,
    Example,
    NeedleScores,
    answer_hits,
    evaluate_needle,
    evaluate_sets,
    example_sets,
    needle_examples,
    token_counter,
)
from loglinear.models import ByteTokenizer, LogLinearForCausalLM
from tests.data.test_needle_documents import NEEDLE, PROSE, listed
from tests.training.tiny import tiny_recipe

TOKENIZER = ByteTokenizer()
SIZES = token_counter(TOKENIZER)
HAYSTACKS = {"noise": Haystack.noise(SIZES), "text": Haystack.of_texts([PROSE], SIZES)}
ASKED = re.compile(r"for ([a-z, -]+) mentioned in the provided text (?:is|are)$")


def examples_of(task, count, length, haystack="noise", seed=0):
    haystack = HAYSTACKS[haystack]
    return needle_examples(task, count, length=length, haystack=haystack, tokenizer=TOKENIZER, seed=seed)


def looked_up(prompt):
    """The answer to a prompt, by reading it."""
    keys = listed(ASKED.search(prompt)[1])
    values = [value for key in keys for k, value in NEEDLE.findall(prompt) if k == key]
    return " " + ", ".join(values[:-1]) + ", and " * (len(values) > 1) + values[-1]


@pytest.mark.parametrize("haystack", HAYSTACKS)
@pytest.mark.parametrize("task", TASKS)
def test_examples_have_their_needles_answer_and_length(task, haystack):
    sizes, sentence = TASKS[task], max(SIZES([NOISE, *HAYSTACKS["text"].sentences]))
    for length in (801, 1500):
        for example in examples_of(task, 5, length, haystack):
            needles = NEEDLE.findall(example.prompt)
            assert len(needles) == sizes.keys * sizes.values and len({key for key, _ in needles}) == sizes.keys
            assert len(listed(ASKED.search(example.prompt)[1])) == sizes.asked
            assert len(example.depths) == len(example.answer[::2]) == sizes.asked * sizes.values
            assert "".join(example.answer) == looked_up(example.prompt)
            for piece, told in zip(example.answer[::2], example.sentences, strict=True):
                assert told.endswith(f" is:{piece}.") and example.prompt.count(told) == 1
            tokens = 1 + sum(SIZES([example.prompt, "".join(example.answer)]))
            assert length - sentence - 2 <= tokens <= length


def test_equal_arguments_give_equal_examples_and_a_larger_count_more_of_them():
    few = examples_of("multikey_1", 3, 900)
    assert few == examples_of("multikey_1", 6, 900)[:3]
    others = [examples_of("multikey_1", 3, 900, seed=1), examples_of("multikey_1", 3, 901)]
    keys = [NEEDLE.findall(example.prompt) for examples in (few, *others) for example in examples]
    assert len({key for needles in keys for key, _ in needles}) == 9 * 4


def test_keys_and_values_are_none_of_the_training_documents():
    needles = [NEEDLE.findall(example.prompt) for task in TASKS for example in examples_of(task, 20, 900)]
    assert all(is_held_out(part) for found in needles for needle in found for part in needle)


def test_depths_are_uniform_and_where_the_values_lie():
    examples = examples_of("multiquery", 250, 9000)
    depths = np.sort([depth for example in examples for depth in example.depths])
    assert np.abs(depths - (np.arange(1000) + 0.5) / 1000).max() < 1.63 / math.sqrt(1000)  # Kolmogorov, 1 %
    for example in examples[:20]:
        for value, depth in zip(example.answer[::2], example.depths, strict=True):
            assert example.prompt.index(value.strip()) / len(example.prompt) == pytest.approx(depth, abs=0.06)


def test_lengths_without_room_and_unknown_tasks_are_named():
    with pytest.raises(ValueError, match="room for a sentence in single_1: .* tokens are enough, got 400"):
        examples_of("single_1", 1, 400)
    with pytest.raises(ValueError, match="task must be one of single_1, .*, got 'cwe'"):
        examples_of("cwe", 1, 4000)


class Reader:
    """A model whose hidden states are logits: behind a prompt those of the answer that it looks up, else random."""

    device, config = torch.device("cpu"), SimpleNamespace()

    def __init__(self, remembers):
        self.remembers, self.logit_rows = remembers, 0

    def base_model(self, input_ids, cu_seqlens, use_cache):
        logits = torch.rand(1, input_ids.shape[1], 264)
        for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            text = bytes(input_ids[0, start + 1 : end].tolist()).decode()
            prompt = re.match(r".*mentioned in the provided text (?:is|are)", text, re.DOTALL)[0]
            for i, byte in enumerate(looked_up(prompt).encode() if self.remembers else b""):
                logits[0, start + len(prompt) + i, byte] = 2
        return SimpleNamespace(last_hidden_state=logits)

    def get_output_embeddings(self):
        def head(hidden):
            self.logit_rows += len(hidden)
            return hidden

        head.weight = torch.empty(0)
        return head


@pytest.mark.parametrize("task", TASKS)
def test_a_perfect_memory_finds_all_and_chance_finds_nothing(task):
    examples = examples_of(task, 12, 1000, "text")
    reader = Reader(remembers=True)
    scores = evaluate_needle(reader, TOKENIZER, examples, row_tokens=3500, label=None)
    assert scores.accuracy == scores.exact_match == 1 and scores.standard_error == 0
    assert reader.logit_rows == sum(SIZES(["".join(example.answer) for example in examples]))
    assert evaluate_needle(Reader(remembers=False), TOKENIZER, examples, label=None).accuracy < 0.05


def test_every_length_has_a_line_before_a_longer_one_begins(capsys):
    """The longest examples take most of the time, so the others do not wait for them."""
    tasks, printed = ["single_2", "multiquery"], []

    class Listening(Reader):
        def base_model(self, input_ids, cu_seqlens, use_cache):
            printed.append((cu_seqlens.diff().max().item(), capsys.readouterr().err))
            return super().base_model(input_ids, cu_seqlens, use_cache)

    sets = example_sets(TOKENIZER, [PROSE], lengths=[1500, 800, 1000], count=3, tasks=tasks)
    shuffled = dict(reversed(sets.items()))
    results = evaluate_sets(Listening(remembers=True), TOKENIZER, shuffled)
    last = capsys.readouterr().err
    longest = [length for length, _ in printed]
    assert len(longest) == 6 and [max(longest[i : i + 2]) // 100 for i in (0, 2, 4)] == [7, 9, 14]
    lines = [
        re.findall(r"[0-9,]+ tokens: [a-z_0-9]+ [0-9.]+, .*$", text, re.MULTILINE)
        for text in (*(text for _, text in printed), last)
    ]
    assert [len(found) for found in lines] == [0, 0, 1, 0, 1, 0, 1]
    assert lines[2] == ["800 tokens: multiquery 1.000, single_2 1.000"]
    for task in tasks:
        assert [score["length"] for score in results[task]] == [800, 1000, 1500]
        alone = evaluate_needle(Reader(remembers=True), TOKENIZER, sets[task, 1000], label=None)
        assert results[task][1] == {"length": 1000, **alone.to_dict()}


@pytest.fixture
def model(tmp_path):
    """A random model that writes digits."""
    torch.manual_seed(0)
    recipe = tiny_recipe(tmp_path)
    config = {**recipe.model, "tie_word_embeddings": False, "initializer_range": 0.5}
    model = LogLinearForCausalLM(tiny_recipe(tmp_path, model=config).model_config()).eval()
    digits = torch.zeros(264, 1)
    digits[48:58] = 1
    with torch.no_grad():
        model.lm_head.weight.mul_(digits)
    return model


def greedy(model, prompt, tokens):
    ids = torch.from_numpy(encode_document(TOKENIZER, prompt)[:-1].astype(np.int64))[None]
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].numpy()


def test_the_score_is_that_of_greedy_decoding(model):
    """The answers that `generate` writes are exact, and no others are: one digit changed, and it shows where."""
    prompts = [example.prompt[: 600 + 7 * i] for i, example in enumerate(examples_of("single_1", 6, 700))]
    written = [bytes(greedy(model, prompt, 7).tolist()).decode() for prompt in prompts]
    assert all(text.isdigit() for text in written) and len(set(written)) > 1
    cut = [[text[:3], text[3:5], text[5:]] for text in written]  # value, separator, value
    right = [Example(prompt, answer, [0.5, 0.5], []) for prompt, answer in zip(prompts, cut, strict=True)]
    scores = evaluate_needle(model, TOKENIZER, right, row_tokens=1500, label=None)
    assert scores.exact_N.all() and scores.found_NV.all()
    for piece in range(3):
        digit = [text[piece][-1] for text in cut]
        other = [text[piece][:-1] + str((int(d) + 1) % 10) for text, d in zip(cut, digit, strict=True)]
        wrong = [
            e._replace(answer=[*e.answer[:piece], o, *e.answer[piece + 1 :]]) for e, o in zip(right, other, strict=True)
        ]
        scores = evaluate_needle(model, TOKENIZER, wrong, label=None)
        assert not scores.exact_N.any()
        assert scores.found_NV[:, 0].all() == (piece > 0) and not (piece == 2 and scores.found_NV[:, 1].any())


def test_hits_do_not_depend_on_the_packing(model):
    pairs = [
        (encode_document(TOKENIZER, example.prompt)[:-1], np.arange(200) % 10 + 48)
        for example in examples_of("multikey_1", 5, 900)
    ]
    together = answer_hits(model, pairs)
    assert any(hits.any() for hits in together)
    for pair, hits in zip(pairs, together, strict=True):
        np.testing.assert_array_equal(answer_hits(model, [pair])[0], hits)


def test_standard_error_is_binomial_and_over_examples():
    found = np.array([[True]] * 30 + [[False]] * 10)
    one = NeedleScores(found, found[:, 0], np.full((40, 1), 0.5))
    assert one.accuracy == 0.75 and one.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 40))
    four = NeedleScores(np.repeat(found, 4, axis=1), found[:, 0], np.full((40, 4), 0.5))
    assert four.standard_error == pytest.approx(one.standard_error)  # four values of one example are one observation


def test_depths_share_all_values_among_them():
    depths = np.array([[0.0, 0.05], [0.1, 1.0], [0.99, 0.55]])
    scores = NeedleScores(np.array([[True, False], [True, True], [False, True]]), np.zeros(3, bool), depths)
    parts = [[part["depth"], part["accuracy"], part["values"]] for part in scores.by_depth()]
    np.testing.assert_allclose(parts, [[0.05, 0.5, 2], [0.15, 1, 1], [0.55, 1, 1], [0.95, 0.5, 2]])


def test_lengths_are_in_tokens_of_any_tokenizer():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    noise = Haystack.noise(token_counter(words))
    for example in needle_examples("multivalue", 3, length=333, haystack=noise, tokenizer=words):
        tokens = len(words(example.prompt)["input_ids"]) + len(words("".join(example.answer))["input_ids"])
        assert 333 - len(words(NOISE)["input_ids"]) <= tokens <= 333

import math

import numpy as np
import pytest
import torch

from loglinear.evaluation import Perplexity, evaluate_perplexity
from loglinear.evaluation.perplexity import token_losses
from loglinear.models import LogLinearForCausalLM
from loglinear.training.data import tokenize
from loglinear.training.sources import Document
from loglinear.training.tokenizer import ByteTokenizer
from tests.training.tiny import tiny_recipe


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    return LogLinearForCausalLM(tiny_recipe(tmp_path).model_config()).eval()


@pytest.fixture
def corpus():
    documents = [Document(f"doc{d}", "".join(chr(97 + (d * i) % 26) for i in range(30 + 40 * d))) for d in range(5)]
    return tokenize(documents, ByteTokenizer())


def test_token_losses_are_those_of_each_sequence_alone(model, corpus):
    sequences = [corpus.document(d) for d in range(3)]
    packed = token_losses(model, sequences)
    for sequence, losses in zip(sequences, packed, strict=True):
        ids = torch.from_numpy(sequence.astype(np.int64))
        logits = model(ids[None]).logits[0, :-1].detach()
        expected = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").double().numpy()
        np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)


def test_uniform_model_needs_log2_of_its_vocabulary(model, corpus):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = evaluate_perplexity(model, corpus, length=64, max_tokens=10**6, progress=False)
    assert result.loss == pytest.approx(math.log(264), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(math.log2(264) / corpus.bytes_per_token, rel=1e-6)
    assert result.standard_error == pytest.approx(0, abs=1e-9)
    curve = result.by_position()["bits_per_byte"]
    assert len(curve) == 5 and curve == pytest.approx([result.bits_per_byte] * 5, rel=1e-6)


def test_every_token_but_each_windows_first_is_predicted_once(model, corpus):
    result = evaluate_perplexity(model, corpus, length=64, max_tokens=10**6, progress=False)
    windows = [-(-len(corpus.document(d)) // 64) for d in range(5)]
    assert result.tokens_D.tolist() == [len(corpus.document(d)) - windows[d] for d in range(5)]
    assert result.nats_NT.shape == (sum(len(corpus.document(d)) // 64 for d in range(5)), 63)


def test_result_does_not_depend_on_the_packing(model, corpus):
    results = [
        evaluate_perplexity(model, corpus, length=64, max_tokens=10**6, row_tokens=rows, progress=False)
        for rows in (64, 1000)
    ]
    np.testing.assert_allclose(results[0].nats_D, results[1].nats_D, rtol=1e-5)


def test_token_limit_sees_every_document_before_any_twice(model, corpus):
    result = evaluate_perplexity(model, corpus, length=32, max_tokens=5 * 32, progress=False)
    assert len(result.names) == 5 and (result.tokens_D <= 31).all()


def test_text_without_anything_to_predict_is_one_clear_line(model, corpus):
    with pytest.raises(ValueError, match="nothing to predict"):
        evaluate_perplexity(model, corpus.take([]), length=8, max_tokens=100, progress=False)


def of(nats, tokens=(10, 20, 40), names=("a", "b", "c")):
    return Perplexity(names, np.array(nats, float), np.array(tokens), 1.0, 8, np.zeros((0, 7)))


def test_standard_error_is_that_of_a_ratio_over_documents():
    nats, tokens = np.array([10.0, 30.0, 50.0]), np.array([10, 20, 40])
    ratio = nats.sum() / tokens.sum()
    error = math.sqrt(3 / 2 * ((nats - ratio * tokens) ** 2).sum()) / tokens.sum()
    assert of(nats).standard_error == pytest.approx(error / math.log(2))


def test_paired_difference_removes_what_is_hard_for_both():
    hard, easy = of([10.0, 60.0, 30.0]), of([10.0 - 1, 60.0 - 2, 30.0 - 4])
    difference, error = easy.difference(hard)
    assert difference == pytest.approx(-0.1 / math.log(2))
    assert error == pytest.approx(0, abs=1e-12) and hard.standard_error > 0.1
    with pytest.raises(ValueError, match="different texts"):
        easy.difference(of([1.0, 2.0, 3.0], names=("a", "b", "other")))


def test_position_bins_average_all_positions_once():
    rng = np.random.default_rng(0)
    nats = rng.random((6, 63))
    curve = Perplexity(("a",), np.ones(1), np.ones(1), 1.0, 64, nats).by_position()
    edges = [0]
    for middle in curve["position"]:
        edges.append(round(2 * middle - 1 - edges[-1]))
    assert edges[-1] == 63
    for low, high, bits in zip(edges[:-1], edges[1:], curve["bits_per_byte"], strict=True):
        assert bits == pytest.approx(nats[:, low:high].mean() / math.log(2))

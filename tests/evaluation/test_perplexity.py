import json
import math

import numpy as np
import pytest
import torch

from loglinear.data.corpus import Corpus, tokenize
from loglinear.data.sources import Document
from loglinear.evaluation import Perplexity, evaluate_perplexity
from loglinear.evaluation.perplexity import token_losses
from loglinear.models import ByteTokenizer, LogLinearForCausalLM
from loglinear.runs.json_files import write_object
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
    windows = sum(-(-len(corpus.document(d)) // 64) for d in range(5))
    later = windows - 5  # their first token is text and context; all other text and five ends are predicted
    tokens, size = len(corpus.tokens) - windows, corpus.bytes_D.sum() - later
    assert result.bits_per_byte == pytest.approx(math.log2(264) * tokens / size, rel=1e-6)
    curve = result.by_position()["bits_per_byte"]
    assert len(curve) == 5 and curve[:4] == pytest.approx([math.log2(264)] * 4, rel=1e-6)


def test_curves_are_empty_where_no_document_is_long_enough(model, corpus):
    result = evaluate_perplexity(model, corpus, length=10_000, max_tokens=10**6, progress=False)
    assert result.by_position() == {"position": [], "bits_per_byte": [], "standard_error": []}
    assert result.by_document(64) == {"documents": [], "position": [], "bits_per_byte": []}


def test_short_documents_count_no_byte_for_their_first_token(model):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    documents = tokenize([Document(f"doc{d}", "ab") for d in range(20)], ByteTokenizer())
    result = evaluate_perplexity(model, documents, length=64, max_tokens=10**6, progress=False)
    assert result.bits_per_byte == pytest.approx(math.log2(264) * 3 / 2, rel=1e-6)
    assert result.standard_error == pytest.approx(0, abs=1e-9)


def test_bytes_are_those_of_the_text_that_was_read(model):
    # Another tokenizer's corpus: 1 byte for each token of one document, 9 for each of the other.
    all_learnt = np.ones(8, bool)
    corpus = Corpus(("a", "b"), np.arange(8) % 4 + 2, np.array([0, 4, 8]), np.array([4, 36]), all_learnt, (0, 1))
    result = evaluate_perplexity(model, corpus, length=4, max_tokens=2, progress=False)
    assert result.names == ("a",) and result.bytes_D.tolist() == [3]


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
    none = np.zeros((0, 7))
    return Perplexity(names, np.array(nats, float), np.array(tokens), np.array(tokens), 8, none, none, np.zeros(0, int))


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


def with_windows(nats_NT, documents):
    one = np.ones(1 + max(documents))
    length = nats_NT.shape[1] + 1
    return Perplexity(
        tuple(map(str, range(len(one)))), one, one, one, length, nats_NT, np.ones_like(nats_NT), np.array(documents)
    )


def test_error_of_the_curve_does_not_shrink_with_windows_of_the_same_documents():
    nats = np.random.default_rng(0).random((3, 63))
    once = with_windows(nats, [0, 1, 2]).by_position()
    often = with_windows(np.repeat(nats, 4, axis=0), np.repeat([0, 1, 2], 4).tolist()).by_position()
    assert often["standard_error"] == pytest.approx(once["standard_error"])
    means = nats[:, :16].mean(1)
    assert once["standard_error"][0] == pytest.approx(means.std(ddof=1) / math.sqrt(3) / math.log(2))


def test_error_of_one_document_is_unknown_and_null_in_json(tmp_path):
    result = with_windows(np.ones((2, 63)), [0, 0])
    write_object(tmp_path / "result.json", result.to_dict())
    stored = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert stored["standard_error"] is None and set(stored["by_position"]["standard_error"]) == {None}
    assert str(result).endswith("± unknown")


def test_position_bins_average_all_positions_once():
    rng = np.random.default_rng(0)
    nats = rng.random((6, 63))
    curve = with_windows(nats, [0] * 6).by_position()
    edges = [0]
    for middle in curve["position"]:
        edges.append(round(2 * middle - 1 - edges[-1]))
    assert edges[-1] == 63
    for low, high, bits in zip(edges[:-1], edges[1:], curve["bits_per_byte"], strict=True):
        assert bits == pytest.approx(nats[:, low:high].mean() / math.log(2))


def test_curves_of_documents_are_those_of_their_windows_and_average_to_the_curve():
    nats = np.random.default_rng(0).random((4, 63))
    result = with_windows(nats, [0, 0, 1, 2])
    found = result.by_document(20)
    assert found["documents"] == ["0", "1", "2"] and found["position"] == [10.5, 30.5, 50.5, 62.0]
    expected = [nats[:2, 60:].mean(), nats[2, 60:].mean(), nats[3, 60:].mean()]
    assert [row[-1] for row in found["bits_per_byte"]] == pytest.approx(np.array(expected) / math.log(2), abs=1e-4)


def test_windows_past_the_training_length_read_all_that_came_before(model, corpus):
    """The tiny model has levels for 32 tokens; longer windows are the model's own forward all the same."""
    document = corpus.document(0)
    result = evaluate_perplexity(model, corpus, length=len(document), max_tokens=10**6, progress=False)
    assert result.nats_NT.shape == (1, len(document) - 1) and result.documents_N.tolist() == [0]
    ids = torch.from_numpy(document.astype(np.int64))
    logits = model(ids[None]).logits[0, :-1].detach()
    expected = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").double().numpy()
    np.testing.assert_allclose(result.nats_NT[0], expected, rtol=1e-4, atol=1e-5)

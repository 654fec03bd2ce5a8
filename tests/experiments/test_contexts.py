"""The loss of each target from at most C tokens before it, against a loop that predicts one token at a time."""

import math

import numpy as np
import pytest
import torch

from experiments.contexts import WINDOWS, evaluate_contexts, losses_by_context
from loglinear.data.corpus import tokenize
from loglinear.data.sources import Document
from loglinear.models import ByteTokenizer, LogLinearForCausalLM
from tests.training.tiny import tiny_recipe

CONTEXTS = (2, 6, 10, 30, 60)  # tokens; no power of two but one


@pytest.fixture(params=["linear_attention", "full_attention"])
def model(request, tmp_path):
    torch.manual_seed(0)
    recipe = tiny_recipe(tmp_path)
    config = recipe.model_config()
    config.layer_types = [request.param]
    return LogLinearForCausalLM(config).double().eval()


def text(*sizes):
    rng = np.random.default_rng(0)
    documents = [Document(f"d{i}", "".join(rng.choice(list("abcd ä"), size))) for i, size in enumerate(sizes)]
    return tokenize(documents, ByteTokenizer())


def one_at_a_time(model, tokens_W, context):
    """The nats of each token of the second half, from a forward pass for each."""
    nats = []
    for t in range(len(tokens_W) // 2, len(tokens_W)):
        first = 2 * t // context * context // 2 - context // 2
        assert context // 2 <= t - first < context
        ids = torch.from_numpy(tokens_W[first:t].astype(np.int64))
        logits = model(ids[None]).logits[0, -1].detach()
        nats.append(-torch.log_softmax(logits, 0)[int(tokens_W[t])].item())
    return np.array(nats)


@pytest.mark.parametrize("row_tokens", [1, 77, 10_000])
def test_losses_are_those_of_tokens_predicted_one_at_a_time(model, row_tokens):
    tokens = text(200).document(0)
    windows = [tokens[3:63], tokens[100:160]]
    found = losses_by_context(model, windows, CONTEXTS, row_tokens=row_tokens)
    expected = [[one_at_a_time(model, tokens_W, context) for tokens_W in windows] for context in CONTEXTS]
    assert found.shape == (len(CONTEXTS), 2, 30)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_text_before_the_context_changes_nothing_and_text_in_it_does(model):
    tokens = text(80).document(0)[:60]
    other = tokens.copy()
    other[:20] = tokens[:20][::-1]
    one, two = (losses_by_context(model, [window], (6, 20, 60), row_tokens=60) for window in (tokens, other))
    np.testing.assert_array_equal(one[:2], two[:2])
    assert (one[2] != two[2]).all()


def test_contexts_that_do_not_tile_the_window_are_refused(model):
    tokens = text(80).document(0)
    for context in (0, 7, 16, 120):
        with pytest.raises(ValueError, match=f"divide the window of 60 tokens, got {context}"):
            losses_by_context(model, [tokens[:60]], [context], row_tokens=60)
    with pytest.raises(ValueError, match="windows must all have 60 tokens"):
        losses_by_context(model, [tokens[:60], tokens[:58]], [60], row_tokens=60)


def test_bits_are_means_over_the_same_targets_by_document_and_position(model):
    corpus = text(62, 90, 200)
    found = evaluate_contexts(model, corpus, (6, 60), progress=False)
    assert found["documents"] == list(corpus.names) and found["targets"] == 3 * WINDOWS * 30
    assert found["position"][0] > 30 and found["position"][-1] < 60
    for context in (6, 60):
        nats_D, bytes_D = [], []
        for begin, end in zip(corpus.offsets_D[:-1], corpus.offsets_D[1:], strict=True):
            firsts = np.linspace(begin, end - 60, WINDOWS).astype(int)  # from the beginning to the end
            nats_D.append(np.stack([one_at_a_time(model, corpus.tokens[f : f + 60], context) for f in firsts]))
            bytes_D.append(np.stack([corpus.token_bytes(f + 30, f + 60) for f in firsts]))
        nats_DNT, bytes_DNT = np.array(nats_D), np.array(bytes_D)
        bits = found["contexts"][str(context)]
        assert bits["bits_per_byte"] == pytest.approx(nats_DNT.sum() / bytes_DNT.sum() / math.log(2))
        by_document = nats_DNT.sum((1, 2)) / bytes_DNT.sum((1, 2)) / math.log(2)
        assert bits["by_document"] == pytest.approx(by_document, abs=1e-5)
        edges = [0, 3, 7, 11, 15, 18, 22, 26, 30]
        by_position = [
            nats_DNT[..., low:high].sum() / bytes_DNT[..., low:high].sum() / math.log(2)
            for low, high in zip(edges[:-1], edges[1:], strict=True)
        ]
        assert bits["by_position"] == pytest.approx(by_position, abs=1e-5)


def test_documents_shorter_than_the_longest_context_are_refused(model):
    for corpus in (text(30, 100), text(100).take([])):
        with pytest.raises(ValueError, match="every document must have 60 tokens"):
            evaluate_contexts(model, corpus, (6, 60), progress=False)

import json
import math
import zlib

import numpy as np
import pytest
import torch

from loglinear.data.sources import Document
from loglinear.data.tokenizer import load_tokenizer
from loglinear.evaluation import evaluate_membership
from loglinear.evaluation.membership import mean_loss, min_k_loss, reference_difference, zlib_ratio
from loglinear.models import ByteTokenizer, LogLinearForCausalLM
from loglinear.runs.json_files import write_object
from tests.data.test_tokenizer import words_without_end
from tests.training.tiny import tiny_recipe


def new_model(seed):
    torch.manual_seed(seed)
    return LogLinearForCausalLM(tiny_recipe(".").model_config()).eval()


def texts(seed, count, length=40):
    rng = np.random.default_rng(seed)
    return [
        Document(f"{seed}:{number}", bytes(rng.integers(97, 123, length + 3 * (number % 6)).tolist()).decode())
        for number in range(count)
    ]


MEMBERS, OTHERS = texts(1, 5), texts(2, 6)


def losses_of(model, text, length=None):
    """The nats of every byte of a text after <bos>, in float64, by its definition."""
    ids = torch.tensor([[ByteTokenizer().bos_token_id, *text.encode()]])[:, :length]
    with torch.no_grad():
        logits = model(ids).logits[0].double()
    return np.array(
        [
            math.log(sum(math.exp(z) for z in row.tolist())) - row[target].item()
            for row, target in zip(logits[:-1], ids[0, 1:].tolist(), strict=True)
        ]
    )


@pytest.mark.parametrize("max_tokens", [2048, 9])
def test_scores_are_their_formulas(max_tokens):
    model, reference = new_model(0), new_model(1)
    found = evaluate_membership(
        model,
        ByteTokenizer(),
        MEMBERS,
        OTHERS,
        reference=(reference, ByteTokenizer()),
        max_tokens=max_tokens,
        min_k=30,
        progress=False,
    )
    assert found.names == tuple(document.name for document in MEMBERS + OTHERS)
    assert found.is_member_D.tolist() == [True] * 5 + [False] * 6
    for d, document in enumerate(MEMBERS + OTHERS):
        text = document.text[: max_tokens - 1]
        nats, of_reference = losses_of(model, text), losses_of(reference, text)
        n = len(nats)
        assert found.tokens_D[d] == n == len(text)
        lowest = sorted(-nats)[: int(0.3 * n)]  # log-probabilities
        expected = {
            "loss": sum(nats) / n,
            "zlib_ratio": sum(nats) / math.log(2) / (8 * len(zlib.compress(text.encode()))),
            "min_k": -sum(lowest) / len(lowest),
            "reference": (sum(nats) - sum(of_reference)) / n,
        }
        for name, value in expected.items():
            assert found.scores[name][d] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_min_k_keeps_at_least_one_token_and_at_most_all():
    nats = np.array([0.5, 3.0, 1.0, 2.0])
    assert min_k_loss(nats, 1) == 3 and min_k_loss(nats, 49) == 3 and min_k_loss(nats, 50) == 2.5
    assert min_k_loss(nats, 100) == mean_loss(nats)
    for percent in (0, 101):
        with pytest.raises(ValueError, match=f"min_k must lie between 1 and 100 percent, got {percent}"):
            min_k_loss(nats, percent)


def test_zlib_ratio_is_bits_over_bits():
    text = b"abcd" * 100
    assert zlib_ratio(np.full(400, math.log(2)), text) == pytest.approx(400 / 8 / len(zlib.compress(text)))


def test_a_model_is_no_better_than_itself():
    assert reference_difference(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0


def test_a_model_that_memorised_its_members_knows_them():
    """Random letters, so that nothing but memory tells members from others. The untrained model is at chance."""
    members, others = texts(3, 12, 24), texts(4, 12, 24)
    model, before = new_model(0), new_model(0)
    rows = [torch.tensor([[256, *document.text.encode()]]) for document in members]
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (0, longest - row.shape[1]), value=-100) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    for _ in range(60):
        loss = model(ids.clamp(min=0), attention_mask=(ids >= 0).long(), labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    tokenizer = ByteTokenizer()
    trained = evaluate_membership(
        model, tokenizer, members, others, reference=(before, tokenizer), progress=False
    ).summary()
    assert set(trained) == {"loss", "zlib_ratio", "min_k", "reference"}
    for name, score in trained.items():
        assert score["auc"] > 0.98 and score["best_f1"] > 0.95 and score["true_positive_rate"] > 0.9, name
    untrained = evaluate_membership(before, tokenizer, texts(5, 99, 24), texts(6, 99, 24), progress=False).summary()
    for score in untrained.values():
        low, high = score["auc_interval"]
        assert low < 0.5 < high and high - low < 0.2


def test_no_two_sets_share_a_document_as_far_as_it_is_read():
    model, tokenizer = new_model(0), ByteTokenizer()
    again = Document("copy", MEMBERS[2].text)
    with pytest.raises(ValueError, match="1 of the others, as far as they are read, are members too: copy is 1:2"):
        evaluate_membership(model, tokenizer, MEMBERS, [*OTHERS, again], progress=False)
    longer = Document("longer", MEMBERS[2].text + " and more")
    assert evaluate_membership(model, tokenizer, MEMBERS, [longer], progress=False).tokens_D[-1] > 40
    with pytest.raises(ValueError, match="longer is 1:2"):
        evaluate_membership(model, tokenizer, MEMBERS, [longer], max_tokens=20, progress=False)


def test_documents_that_cannot_be_scored_are_named(tmp_path):
    words_without_end(tmp_path)
    words = load_tokenizer(tmp_path)  # with no token before a text, and none needed behind it
    model = new_model(0)
    sentences = [Document("sentence", "a b a")], [Document("word", "a")]
    with pytest.raises(ValueError, match="document word has 1 token, expected at least 2"):
        evaluate_membership(model, words, *sentences, progress=False)
    found = evaluate_membership(model, words, sentences[0], [Document("two", "b a")], progress=False)
    assert found.tokens_D.tolist() == [2, 1]
    with pytest.raises(ValueError, match="document half is not text: character 1 is a lone surrogate"):
        evaluate_membership(model, ByteTokenizer(), MEMBERS, [Document("half", "a\udc00")], progress=False)
    with pytest.raises(ValueError, match="max_tokens must be at least 2, got 1"):
        evaluate_membership(model, ByteTokenizer(), MEMBERS, OTHERS, max_tokens=1, progress=False)
    for members, others, name in (([], OTHERS, "members"), (MEMBERS, [], "others")):
        with pytest.raises(ValueError, match=f"there are no {name}, expected at least one document"):
            evaluate_membership(model, ByteTokenizer(), members, others, progress=False)


def test_a_reference_reads_the_same_tokens(tmp_path):
    words_without_end(tmp_path)
    reference = (new_model(1), load_tokenizer(tmp_path))
    with pytest.raises(ValueError, match="must have the tokens of the model, but its tokenizer reads 1:0 differently"):
        evaluate_membership(new_model(0), ByteTokenizer(), MEMBERS, OTHERS, reference=reference, progress=False)


def test_a_broken_model_is_one_clear_line():
    model = new_model(0)
    with torch.no_grad():
        model.lm_head.weight[:] = math.nan
    with pytest.raises(ValueError, match="the model has a loss of nan on document 1:0, expected a number"):
        evaluate_membership(model, ByteTokenizer(), MEMBERS, OTHERS, progress=False)


def test_text_of_a_cut_character_is_compressed(tmp_path):
    """The last of these tokens is the first byte of two."""
    umlauts = [Document("a", "äöü" * 9), Document("b", "öäü" * 9)]
    found = evaluate_membership(new_model(0), ByteTokenizer(), umlauts[:1], umlauts[1:], max_tokens=12, progress=False)
    assert found.tokens_D.tolist() == [11, 11] and np.isfinite(found.scores["zlib_ratio"]).all()


def test_results_are_strict_json_and_repeat_with_their_seed(tmp_path):
    found = evaluate_membership(new_model(0), ByteTokenizer(), MEMBERS, OTHERS, progress=False)
    assert found.to_dict(7) == found.to_dict(7) and found.to_dict(7) != found.to_dict(8)
    write_object(tmp_path / "result.json", found.to_dict(7))
    stored = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert stored["bootstrap"] == {"samples": 1000, "level": 0.95, "seed": 7}
    assert [document["member"] for document in stored["documents"]] == [True] * 5 + [False] * 6
    assert stored["documents"][0]["loss"] == found.scores["loss"][0]
    assert list(stored["scores"]) == ["loss", "zlib_ratio", "min_k"]

"""Batches hold all examples; loss and accuracy at the queries are those of the whole model."""

import dataclasses
from functools import partial

import pytest
import torch
from accelerate import cpu_offload

from loglinear.data.packing import IGNORED
from loglinear.evaluation.mqar import Recall, recall_batches, recall_counts, recall_examples, recall_loss, recall_scores
from loglinear.evaluation.mqar.batches import split_batches
from loglinear.models import LogLinearForCausalLM
from tests.evaluation.mqar.tiny import TASK, tiny_cell


@pytest.fixture(params=["attention", "log_linear_mamba2", "gated_delta_net"])
def model(request):
    return LogLinearForCausalLM(tiny_cell(model=request.param).model_config())


def test_batches_hold_every_example_once_in_order_and_the_last_is_smaller():
    recall = recall_examples(10, length=12, pairs=3, vocab_size=20, seed=0)
    batches = split_batches(recall, 4, "cpu")
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), recall.tokens_NT)
    for batch, labels in zip(batches, recall.labels_NT.split(4), strict=True):
        restored = torch.full_like(labels, IGNORED)
        restored[:, 1:] = (
            torch.full_like(labels, IGNORED)
            .flatten()
            .scatter(0, batch["queries"], batch["answers"])
            .view_as(labels)[:, :-1]
        )
        assert torch.equal(restored, labels)


def test_splits_are_of_the_sizes_asked_for_and_share_no_example():
    task = dataclasses.replace(TASK, vocab_size=100, examples=300, test_examples=40)
    splits = {split: recall_batches(task, split, "cpu") for split in ("train", "validation", "test")}
    for pairs in task.pairs:
        rows = [
            {
                tuple(row)
                for batch in batches
                if len(batch["answers"]) == pairs * len(batch["input_ids"])
                for row in batch["input_ids"].tolist()
            }
            for batches in splits.values()
        ]
        assert [len(part) for part in rows] == [300, 40, 40]
        assert len(set.union(*rows)) == 380


def test_loss_and_its_gradients_are_those_of_the_models_own_loss(model):
    recall = recall_examples(6, length=8, pairs=2, vocab_size=12, seed=3)
    (batch,) = split_batches(recall, 6, "cpu")
    model = model.double()
    gradients = []
    losses = [recall_loss(model, batch), model(recall.tokens_NT, labels=recall.labels_NT).loss]
    for loss in losses:
        model.zero_grad()
        loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)


def test_jittered_batches_start_each_sequence_where_its_example_says():
    task = TASK.override(jitter=True, test_examples=70)
    plain, jittered = (recall_batches(t, "test", "cpu") for t in (TASK.override(test_examples=70), task))
    starts = torch.cat([batch["initial_position"] for batch in jittered])
    assert len(starts) == 140 and starts.unique().tolist() == [*range(8)]
    model = LogLinearForCausalLM(tiny_cell(model="log_linear_mamba2", task=task).model_config()).double()
    assert model.config.num_levels == 5  # positions 0 to 14
    for one, other in zip(jittered, plain, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"]) and "initial_position" not in other
        logits = model(one["input_ids"], initial_position=one["initial_position"]).logits.flatten(0, 1)
        right = logits[one["queries"]].argmax(-1) == one["answers"]
        expected = torch.nn.functional.cross_entropy(logits[one["queries"]], one["answers"])
        torch.testing.assert_close(recall_loss(model, one), expected, rtol=1e-10, atol=1e-10)
        assert recall_scores(partial(recall_counts, model), [one]).mean == pytest.approx(float(right.double().mean()))
        assert not torch.allclose(recall_loss(model, one), recall_loss(model, other), rtol=1e-9, atol=0)


def test_accuracy_counts_the_likeliest_tokens_of_the_whole_model(model):
    parts = {pairs: recall_examples(50, length=8, pairs=pairs, vocab_size=12, seed=pairs) for pairs in (1, 2)}
    with torch.no_grad():
        guesses = {pairs: model(recall.tokens_NT).logits.argmax(-1) for pairs, recall in parts.items()}
    # Labels that are the model's own guesses in two of three examples.
    for pairs, recall in parts.items():
        guessed = torch.where(recall.labels_NT == IGNORED, IGNORED, guesses[pairs].roll(1, dims=1))
        wrong = torch.where(guessed == IGNORED, IGNORED, (guessed + 1) % 12)
        right = (torch.arange(50) % 3 < 2).unsqueeze(1)
        parts[pairs] = Recall(recall.tokens_NT, torch.where(right, guessed, wrong))
    batches = [batch for recall in parts.values() for batch in split_batches(recall, 16, "cpu")]
    scores = recall_scores(partial(recall_counts, model), batches)
    assert scores.accuracy == pytest.approx({1: 34 / 50, 2: 34 / 50}) and scores.mean == pytest.approx(34 / 50)
    with torch.no_grad():
        losses = [model(recall.tokens_NT, labels=recall.labels_NT).loss for recall in parts.values()]
    assert scores.loss == pytest.approx(float(sum(losses)) / 2, rel=1e-5)


def test_the_head_is_called_so_that_an_offloaded_model_gives_the_same(model):
    batch = split_batches(recall_examples(6, length=8, pairs=2, vocab_size=12, seed=3), 6, "cpu")[0]
    with torch.no_grad():
        expected = recall_loss(model, batch), recall_scores(partial(recall_counts, model), [batch])
        offloaded = cpu_offload(model)
        assert offloaded.lm_head.weight.device.type == "meta"
        assert (recall_loss(offloaded, batch), recall_scores(partial(recall_counts, offloaded), [batch])) == expected

"""Batches of examples on the device, and the loss and accuracy of a model on them.

All examples of a batch have the same number of pairs, so a batch has a fixed number of queries. Vocabulary logits are
computed only there.
"""

# N examples, T tokens, P pairs, B examples of a batch, D hidden size
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from loglinear.data.packing import IGNORED
from loglinear.evaluation.mqar.cells import RecallTask
from loglinear.evaluation.mqar.examples import Recall, recall_examples
from loglinear.models import LogLinearForCausalLM

SPLITS = ("train", "validation", "test")


class _Queries(TypedDict):
    input_ids: Tensor  # [B, T]
    queries: Tensor  # [B P] places in the flattened batch that predict the answers
    answers: Tensor  # [B P] the targets there


class RecallBatch(_Queries, total=False):
    """The input of a training step."""

    initial_position: Tensor  # [B] of a jittered task: the position of the tree at which each sequence starts


class Scores(NamedTuple):
    """The scores of a model on some batches."""

    accuracy: dict[int, float]  # by number of pairs: the share of queries with the right likeliest token
    loss: float  # nats of a query, the mean over the numbers of pairs

    @property
    def mean(self) -> float:
        """The mean accuracy over the numbers of pairs."""
        return sum(self.accuracy.values()) / len(self.accuracy)


def recall_batches(task: RecallTask, split: str, device: str | torch.device) -> list[RecallBatch]:
    """Return all batches of a split on the device. The last batch of each number of pairs may be smaller.

    The three splits have different seeds. Equal tasks have equal examples.
    """
    batches: list[RecallBatch] = []
    for pairs, length, examples in task.settings(training=split == "train"):
        seed = len(SPLITS) * pairs + SPLITS.index(split)
        recall = recall_examples(
            examples, length=length, pairs=pairs, seed=seed, vocab_size=task.vocab_size, starts=task.starts
        )
        batches += split_batches(recall, task.batch_size, device)
    return batches


def split_batches(recall: Recall, batch_size: int, device: str | torch.device) -> list[RecallBatch]:
    """Return examples of one number of pairs as batches, in their order."""
    N, T = recall.tokens_NT.shape
    targets_NT = F.pad(recall.labels_NT[:, 1:], (0, 1), value=IGNORED)
    example, place = (targets_NT != IGNORED).nonzero(as_tuple=True)
    queries_NP = (example % batch_size * T + place).view(N, -1).to(device)
    answers_NP = targets_NT[example, place].view(N, -1).to(device)
    parts = (x.split(batch_size) for x in (recall.tokens_NT.to(device), queries_NP, answers_NP))
    batches = [
        RecallBatch(input_ids=tokens, queries=queries.flatten(), answers=answers.flatten())
        for tokens, queries, answers in zip(*parts, strict=True)
    ]
    if recall.starts_N is not None:
        for batch, starts in zip(batches, recall.starts_N.to(device).split(batch_size), strict=True):
            batch["initial_position"] = starts
    return batches


def recall_loss(model: LogLinearForCausalLM, batch: RecallBatch) -> Tensor:
    """Return the mean nats of the answers, which equal the model's own loss for the labels of these examples."""
    logits = model.lm_head(_at_queries(model, batch))
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), batch["answers"])


def _at_queries(model: LogLinearForCausalLM, batch: RecallBatch) -> Tensor:
    """Return the hidden states [B P, D] that predict the answers."""
    start = batch.get("initial_position")
    hidden_BTD = model.model(batch["input_ids"], initial_position=start, use_cache=False).last_hidden_state
    return hidden_BTD.flatten(0, 1).index_select(0, batch["queries"])


@torch.no_grad()
def recall_counts(model: LogLinearForCausalLM, batch: RecallBatch) -> Tensor:
    """Return three float64 numbers of a batch: the correct answers, their nats, and the queries.

    The head computes in the model's own precision even under autocast, because rounded logits have ties.
    """
    answers = batch["answers"]
    hidden = _at_queries(model, batch)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = model.lm_head(hidden.to(model.dtype))
    correct = (logits.argmax(-1) == answers).sum()
    nats = F.cross_entropy(logits, answers, reduction="sum")
    return torch.stack([correct.double(), nats.double(), torch.full_like(nats, len(answers)).double()])


def recall_scores(counts: Callable[[RecallBatch], Tensor], batches: Iterable[RecallBatch]) -> Scores:
    """Return accuracy and loss over all queries of each number of pairs. Waits for the device once.

    `counts` returns the numbers of `recall_counts` for a batch. A later call may overwrite them.
    """
    sums: dict[int, Tensor] = {}
    for batch in batches:
        pairs = len(batch["answers"]) // len(batch["input_ids"])
        sums[pairs] = counts(batch) + sums.get(pairs, 0.0)
    rows = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
    return Scores(
        accuracy={pairs: correct / queries for pairs, (correct, _, queries) in rows.items()},
        loss=sum(nats / queries for _, nats, queries in rows.values()) / len(rows),
    )

"""Examples as whole batches on the device, and a model's loss and accuracy on them.

A batch has examples with one number of pairs only, so it has a fixed number of supervised positions: vocabulary logits
are computed there and nowhere else.
"""

# N examples, T tokens, P pairs, B examples of a batch, D hidden size
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from loglinear.evaluation.mqar.examples import Recall, recall_examples
from loglinear.models import LogLinearForCausalLM
from loglinear.recipes.mqar import RecallTask
from loglinear.training.data import IGNORED

SPLITS = ("train", "validation", "test")


class RecallBatch(TypedDict):
    """What a training step takes."""

    input_ids: Tensor  # [B, T]
    queries: Tensor  # [B P] where the answers are predicted, as places of the flattened batch
    answers: Tensor  # [B P] the tokens to predict there


class Scores(NamedTuple):
    """A model's answers on some batches."""

    accuracy: dict[int, float]  # by number of pairs: the share of queries whose likeliest answer is right
    loss: float  # nats of a query, the mean over the numbers of pairs

    @property
    def mean(self) -> float:
        """The mean over the numbers of pairs."""
        return sum(self.accuracy.values()) / len(self.accuracy)


def recall_batches(task: RecallTask, split: str, device: str | torch.device) -> list[RecallBatch]:
    """All batches of a split, ready on the device; a last batch of each number of pairs may be smaller.

    The three splits have different seeds, and equal tasks equal examples.
    """
    batches: list[RecallBatch] = []
    for pairs, length, examples in task.settings(training=split == "train"):
        seed = len(SPLITS) * pairs + SPLITS.index(split)
        recall = recall_examples(examples, length=length, pairs=pairs, seed=seed, vocab_size=task.vocab_size)
        batches += split_batches(recall, task.batch_size, device)
    return batches


def split_batches(recall: Recall, batch_size: int, device: str | torch.device) -> list[RecallBatch]:
    """Examples of one number of pairs, in their order, as batches."""
    N, T = recall.tokens_NT.shape
    targets_NT = F.pad(recall.labels_NT[:, 1:], (0, 1), value=IGNORED)
    example, place = (targets_NT != IGNORED).nonzero(as_tuple=True)
    queries_NP = (example % batch_size * T + place).view(N, -1).to(device)
    answers_NP = targets_NT[example, place].view(N, -1).to(device)
    parts = (x.split(batch_size) for x in (recall.tokens_NT.to(device), queries_NP, answers_NP))
    return [
        RecallBatch(input_ids=tokens, queries=queries.flatten(), answers=answers.flatten())
        for tokens, queries, answers in zip(*parts, strict=True)
    ]


def answer_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """Mean nats of answers [N] from logits [N, V]."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), answers)


def recall_loss(
    model: LogLinearForCausalLM, batch: RecallBatch, loss: Callable[[Tensor, Tensor], Tensor] = answer_loss
) -> Tensor:
    """Mean nats of the answers: what the model's own loss gives for the labels of these examples. `loss`: answer_loss,
    compiled perhaps."""
    return loss(model.lm_head(_at_queries(model, batch)), batch["answers"])


def _at_queries(model: LogLinearForCausalLM, batch: RecallBatch) -> Tensor:
    """Hidden states [B P, D] that predict the answers."""
    hidden_BTD = model.model(batch["input_ids"], use_cache=False).last_hidden_state
    return hidden_BTD.flatten(0, 1).index_select(0, batch["queries"])


@torch.no_grad()
def recall_scores(model: LogLinearForCausalLM, batches: Iterable[RecallBatch]) -> Scores:
    """Accuracy and loss over all queries of each number of pairs; waits for the device once.

    The head is computed in the model's own precision, also under autocast: rounded logits have ties.
    """
    sums: dict[int, Tensor] = {}  # correct answers, nats, queries
    for batch in batches:
        answers = batch["answers"]
        hidden = _at_queries(model, batch)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = model.lm_head(hidden.to(model.dtype))
        correct = (logits.argmax(-1) == answers).sum()
        nats = F.cross_entropy(logits, answers, reduction="sum")
        pairs = len(answers) // len(batch["input_ids"])
        part = torch.stack([correct.double(), nats.double(), torch.full_like(nats, len(answers)).double()])
        sums[pairs] = sums[pairs] + part if pairs in sums else part
    rows = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
    return Scores(
        accuracy={pairs: correct / queries for pairs, (correct, _, queries) in rows.items()},
        loss=sum(nats / queries for _, nats, queries in rows.values()) / len(rows),
    )

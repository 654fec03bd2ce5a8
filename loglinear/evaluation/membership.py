"""Membership inference: documents that a model was trained on, told from others of the same distribution.

Each document has up to four scores. All are made of the nats l_t = -ln p(x_t | x_<t) of its n predicted tokens. A
low score speaks for membership. The first token of a document has no token before it and is not predicted, except after
a beginning-of-sequence token.

# D documents, members first
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from loglinear.data.sources import Document
from loglinear.data.tokenizer import encode_prompt, first_tokens
from loglinear.evaluation.padded import padded_losses
from loglinear.evaluation.roc import LEVEL, SAMPLES, RocCurve, roc_curve

MAX_TOKENS = 2048
MIN_K = 20  # percent
FEW = 0.01  # the false positive rate of `Membership.summary`


def mean_loss(nats: np.ndarray) -> float:
    """Return the loss (1 / n) sum_t l_t, in nats per token.

    Source: Yeom et al., Privacy Risk in Machine Learning, 2018, arXiv 1709.01604.
    """
    return float(nats.mean())


def zlib_ratio(nats: np.ndarray, text: bytes) -> float:
    """Return the bits of a document under the model over its bits under zlib: sum_t l_t / ln 2 / (8 |zlib(text)|).

    A repetitive text, which every model predicts well, is short under zlib too. The source divides the loss per token
    of documents of equally many tokens. This ratio gives them the same order, and does not depend on the number of
    tokens.

    Source: Carlini et al., Extracting Training Data from Large Language Models, 2021, arXiv 2012.07805.
    """
    return float(nats.sum() / math.log(2) / (8 * len(zlib.compress(text))))


def min_k_loss(nats: np.ndarray, percent: int = MIN_K) -> float:
    """Return the mean loss of the least likely tokens, in nats: (1 / |K|) sum_{t in K} l_t.

    K holds the largest `percent` % of all l_t, rounded down, and at least one. The published Min-K % Prob is its
    negative.

    Raises ValueError unless `percent` lies between 1 and 100.

    Source: Shi et al., Detecting Pretraining Data from Large Language Models, 2023, arXiv 2310.16789.
    """
    _check_percent(percent)
    kept = max(1, len(nats) * percent // 100)
    return float(np.sort(nats)[-kept:].mean())


def _check_percent(percent: int) -> None:
    if not 1 <= percent <= 100:
        raise ValueError(f"min_k must lie between 1 and 100 percent, got {percent}")


def reference_difference(nats: np.ndarray, reference_nats: np.ndarray) -> float:
    """Return the loss minus that of a reference model on the same tokens, in nats: (1 / n) sum_t (l_t - r_t).

    The reference removes the difficulty of a document. It should not have been trained on the members.

    Source: Carlini et al., Membership Inference Attacks From First Principles, 2022, arXiv 2112.03570, and for language
    models Mireshghallah et al., 2022, arXiv 2203.03929: the logarithm of the likelihood ratio, here per token.
    """
    return mean_loss(nats) - mean_loss(reference_nats)


@dataclass(frozen=True)
class Membership:
    """The scores of members and others, by document."""

    names: tuple[str, ...]
    is_member_D: np.ndarray  # bool
    tokens_D: np.ndarray  # predicted tokens of each document
    scores: dict[str, np.ndarray]  # "loss", "zlib_ratio", "min_k" and, with a reference, "reference": [D]

    @cached_property
    def curves(self) -> dict[str, RocCurve]:
        """The curve of each score."""
        member = self.is_member_D
        return {name: roc_curve(score_D[member], score_D[~member]) for name, score_D in self.scores.items()}

    def summary(self, seed: int = 0) -> dict[str, dict[str, Any]]:
        """Return for each score its area, the area's bootstrap interval, its best F1 and a true positive rate.

        "true_positive_rate" is taken at a false positive rate of at most 1 %. "threshold" is that of "best_f1".
        """
        found = {}
        for name, curve in self.curves.items():
            f1, threshold = curve.best_f1()
            found[name] = {
                "auc": curve.auc,
                "auc_interval": list(curve.auc_interval(seed)),
                "best_f1": f1,
                "threshold": threshold,
                "true_positive_rate": curve.true_positive_rate_at(FEW),
            }
        return found

    def to_dict(self, seed: int = 0) -> dict[str, Any]:
        """Return the summary and the scores of every document as plain JSON types."""
        documents = []
        for d, name in enumerate(self.names):
            scores = {score: float(score_D[d]) for score, score_D in self.scores.items()}
            documents.append(
                {"name": name, "member": bool(self.is_member_D[d]), "tokens": int(self.tokens_D[d]), **scores}
            )
        bootstrap = {"samples": SAMPLES, "level": LEVEL, "seed": seed}
        summary = self.summary(seed)
        return {"bootstrap": bootstrap, "false_positive_rate": FEW, "scores": summary, "documents": documents}


class _Read(NamedTuple):
    """The part of a document that the model reads."""

    name: str
    text: bytes
    tokens: np.ndarray


def evaluate_membership(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    members: Sequence[Document],
    others: Sequence[Document],
    *,
    reference: tuple[Any, PreTrainedTokenizerBase] | None = None,
    max_tokens: int = MAX_TOKENS,
    min_k: int = MIN_K,
    progress: bool = True,
) -> Membership:
    """Return the scores of members and others under any causal language model of transformers.

    `max_tokens` tokens of each document are read, from its beginning; zlib compresses the text of these tokens.
    `reference` is a second model with its tokenizer. `min_k` is a percentage.

    Raises ValueError if there are no members or no others, or if they share a document, as far as it is read. It is
    also raised for a document shorter than two tokens, for a reference with other tokens, for a loss that is not
    finite, and for arguments out of range.
    """
    _check_percent(min_k)  # before minutes of forward passes
    for name, part in (("members", members), ("others", others)):
        if not part:
            raise ValueError(f"there are no {name}, expected at least one document")
    documents = [*_read(tokenizer, members, max_tokens), *_read(tokenizer, others, max_tokens)]
    is_member_D = np.arange(len(documents)) < len(members)
    _refuse_shared(documents[: len(members)], documents[len(members) :])
    if reference is not None:
        _refuse_other_tokens(documents, [*members, *others], reference[1], max_tokens)
    nats = _losses(model, documents, "model", progress)
    scores = {
        "loss": [mean_loss(nats_T) for nats_T in nats],
        "zlib_ratio": [zlib_ratio(nats_T, document.text) for nats_T, document in zip(nats, documents, strict=True)],
        "min_k": [min_k_loss(nats_T, min_k) for nats_T in nats],
    }
    if reference is not None:
        differing = zip(nats, _losses(reference[0], documents, "reference", progress), strict=True)
        scores["reference"] = [reference_difference(*pair) for pair in differing]
    return Membership(
        names=tuple(document.name for document in documents),
        is_member_D=is_member_D,
        tokens_D=np.array([len(nats_T) for nats_T in nats]),
        scores={name: np.array(score_D) for name, score_D in scores.items()},
    )


def _read(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], max_tokens: int) -> Iterator[_Read]:
    """Yield the beginnings of documents. Raises ValueError for one without a token to predict."""
    if max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2, got {max_tokens}")
    first = len(first_tokens(tokenizer))
    for document in documents:
        text, tokens = document.encode(), encode_prompt(tokenizer, document.text)
        if len(tokens) < 2:
            raise ValueError(f"document {document.name} has {len(tokens)} token, expected at least 2")
        if len(tokens) > max_tokens:
            tokens = tokens[:max_tokens]
            text = str(tokenizer.decode(tokens[first:].tolist(), clean_up_tokenization_spaces=False)).encode()
        yield _Read(document.name, text, tokens)


def _refuse_shared(members: Sequence[_Read], others: Sequence[_Read]) -> None:
    names = {member.tokens.tobytes(): member.name for member in members}
    shared = [other for other in others if other.tokens.tobytes() in names]
    if shared:
        name = names[shared[0].tokens.tobytes()]
        raise ValueError(
            f"members and others must differ, but {len(shared)} of the others, as far as they are read, are members "
            f"too: {shared[0].name} is {name}"
        )


def _refuse_other_tokens(
    documents: Sequence[_Read], texts: Sequence[Document], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> None:
    for document, (name, text, *_) in zip(documents, texts, strict=True):
        if not np.array_equal(document.tokens, encode_prompt(tokenizer, text)[:max_tokens]):
            raise ValueError(
                f"the reference must have the tokens of the model, but its tokenizer reads {name} differently"
            )


def _losses(model: Any, documents: Sequence[_Read], label: str, progress: bool) -> list[np.ndarray]:
    """Return the nats of each document. Raises ValueError, which names it, where they are not finite."""
    losses = padded_losses(model, [document.tokens for document in documents], label=label if progress else None)
    for document, nats_T in zip(documents, losses, strict=True):
        if not np.isfinite(nats_T).all():
            raise ValueError(f"the {label} has a loss of {nats_T.sum()} on document {document.name}, expected a number")
    return losses

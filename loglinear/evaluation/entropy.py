"""The entropy of the distribution behind every token of a sampled answer, and the tokens where it is largest.

# V entries of the vocabulary, N tokens of the answer
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from loglinear.evaluation.sampling import sample

CONTEXT = 8  # tokens of the prompt before the answer: some tokenizers drop the space before the first token of a text
NEWLINE, SPACE, PART, UNKNOWN = "\u23ce", "\u2423", "\u00b7", "\ufffd"  # PART is a later token of a character
JOINERS = "\u200c\u200d"  # parts of emoji and of words, which change their neighbours


@dataclass(frozen=True)
class SampledToken:
    """A token of an answer, with the distribution that it was drawn from at temperature 1."""

    id: int
    text: str  # the first token of a character has all of it, its other tokens have the empty text
    entropy: float  # nats
    log_probability: float  # nats, of this token

    @property
    def bits(self) -> float:
        """The entropy in bits."""
        return self.entropy / math.log(2)

    @property
    def probability(self) -> float:
        """The probability with which a sample at temperature 1 has this token here."""
        return math.exp(self.log_probability)


@dataclass(frozen=True)
class SampledAnswer:
    """A sampled answer, token by token. Its forking tokens are those of the highest entropy."""

    prompt: str
    tokens: tuple[SampledToken, ...]
    quantile: float  # the share of forking tokens

    @property
    def entropies(self) -> np.ndarray:
        """The entropies [N] in nats."""
        return np.array([token.entropy for token in self.tokens])

    @property
    def threshold(self) -> float:
        """The (1 - quantile)-quantile of the entropies, interpolated linearly as TRL's `top_entropy_quantile` does."""
        return float(np.quantile(self.entropies, 1 - self.quantile))

    @property
    def is_forking(self) -> np.ndarray:
        """The mask [N] of tokens with at least the threshold's entropy. Equal entropies may exceed the quantile."""
        return self.entropies >= self.threshold

    @property
    def shares(self) -> np.ndarray:
        """The entropies [N] as shares of the highest one, which colours show."""
        return self.entropies / max(float(self.entropies.max()), np.finfo(float).tiny)

    def forking(self) -> list[int]:
        """Return the indices of the forking tokens, the highest entropy first, equal ones in their order."""
        order = np.argsort(-self.entropies, kind="stable")
        return order[self.is_forking[order]].tolist()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types, entropies and logarithms in nats."""
        return {
            "prompt": self.prompt,
            "answer": "".join(token.text for token in self.tokens),
            "quantile": self.quantile,
            "threshold": self.threshold,
            "mean_entropy": float(self.entropies.mean()),
            "tokens": [
                {**vars(token), "forking": bool(forking)}
                for token, forking in zip(self.tokens, self.is_forking, strict=True)
            ],
        }


def sample_with_entropy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    quantile: float = 0.2,
    seed: int = 0,
) -> SampledAnswer:
    """Return a sampled answer with the entropy of every token's distribution.

        H_t = - sum_v p(v | x_<t) log p(v | x_<t),    p(. | x_<t) = softmax(logits_t)

    H_t is in nats and in float32. It describes the distribution at temperature 1, whatever the temperature of the
    sampling, so that answers of all temperatures can be compared. The source defines p with the decoding temperature.
    At the default, 1, both agree, and the token was drawn from this very distribution. The logits are those of the
    steps that drew the tokens, so a model with decode_top_k is measured as it decodes. An end-of-sequence token is a
    token of the answer.

    The tokens whose H_t is at least the (1 - quantile)-quantile of the answer are its forking tokens. Source: "Beyond
    the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM Reasoning",
    arXiv 2506.01939, where quantile = 0.2.

    Raises ValueError as `sample` does, and for a quantile that is not more than 0 and at most 1.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must be more than 0 and at most 1, got {quantile}")
    steps = _Steps()
    result = sample(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        observer=steps,
    )
    ids = result.ids[-result.tokens :]
    texts = token_texts(tokenizer, result.ids[: -result.tokens], ids)
    columns = zip(ids, texts, steps.entropies(), steps.log_probabilities(result.ids[-1]), strict=True)
    return SampledAnswer(prompt, tuple(SampledToken(*column) for column in columns), quantile)


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy [...] in nats of softmax(logits) for logits [..., V]: H = - sum_v p_v log p_v.

    It is computed in at least float32. A logit of minus infinity adds nothing.
    """
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.special.entr(precise.softmax(-1)).sum(-1)


class _Steps(LogitsProcessor):
    """The entropy of every step of one sequence, and the log probability of the token that the step drew.

    Only one row of log probabilities is kept: the next step tells which token was drawn.
    """

    def __init__(self) -> None:
        self._entropies: list[Tensor] = []
        self._drawn: list[Tensor] = []
        self._last: Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self._last is not None:
            self._drawn.append(self._last[input_ids[0, -1]])
        self._last = scores[0].float().log_softmax(-1)
        self._entropies.append(entropy(scores[0]))
        return scores

    def entropies(self) -> list[float]:
        return torch.stack(self._entropies).tolist()

    def log_probabilities(self, last: int) -> list[float]:
        """Return the log probabilities of all steps; `last` is the token of the last step."""
        assert self._last is not None
        return torch.stack([*self._drawn, self._last[last]]).tolist()


def token_texts(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> list[str]:
    """Return the text of each token after the tokens `before`. Joined, they are the text of all of them.

    A character of several tokens belongs to the first one, and the others have the empty text. Bytes that are no
    character are U+FFFD.
    """
    known = list(before[-CONTEXT:])
    prefixes = [
        str(tokenizer.decode([*known, *ids[:end]], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for end in range(len(ids) + 1)
    ]
    # A prefix that ends inside a character may have more characters than a longer prefix: half of it can be two U+FFFD.
    ends = np.minimum.accumulate([len(prefix) for prefix in prefixes][::-1])[::-1]
    return [prefixes[-1][start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)]


def visible_lines(text: str) -> list[str]:
    """Return the text of a token as it is shown, cut after its line ends. Every character of it is visible.

    A line end is shown as U+23CE, a control character as its picture, and the empty text of a character's later
    tokens as a middle dot.
    """
    *ended, last = text.split("\n")
    return [*(_visible(line) + NEWLINE for line in ended), _visible(last)] if text else [PART]


def label(text: str) -> str:
    """Return the text of a token as a list shows it: in one line, with its spaces as U+2423."""
    return "".join(visible_lines(text)).replace(" ", SPACE)


def _visible(line: str) -> str:
    return "".join(_picture(character) for character in line)


def _picture(character: str) -> str:
    if character in "\t\x7f":
        return {"\t": "\u21e5", "\x7f": "\u2421"}[character]
    if character < " ":
        return chr(0x2400 + ord(character))
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in JOINERS
    return UNKNOWN if hidden else character

"""Answers that are read as decoding reads them: a prompt in one forward pass, then one token after the other.

# B examples, P tokens of the longest prompt but its last, A tokens of the longest answer
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from loglinear.evaluation.packed import logits_of
from loglinear.evaluation.padded import padded


@torch.no_grad()
def stepped_hits(model: Any, examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Return, for each (prompt, answer) of token ids, a mask of the tokens of the answer that are the likeliest.

    As `answer_hits`, but in decode steps. The prompts without their last tokens are one padded forward pass. Then every
    row reads the last token of its prompt and the true tokens of its answer one by one. So each token of an answer is
    predicted by a step, with the decode_top_k of the model. A prompt has at least 2 tokens.
    """
    prompts, answers = zip(*examples, strict=True)
    last_tokens = [prompt[-1:] for prompt in prompts]
    read, is_read = padded([prompt[:-1] for prompt in prompts], model.device, left=True)
    steps = [np.concatenate([last, answer[:-1]]) for last, answer in zip(last_tokens, answers, strict=True)]
    tokens, is_token = padded(steps, model.device)
    targets, _ = padded(list(answers), model.device)
    decoder, mask = model.base_model, is_read
    cache = _cache_of(decoder(input_ids=read, attention_mask=mask, use_cache=True))
    hits = []
    for token, active, target in zip(tokens.T, is_token.T, targets.T, strict=True):
        mask = torch.cat([mask, active[:, None]], 1)
        output = decoder(input_ids=token[:, None], attention_mask=mask, past_key_values=cache, use_cache=True)
        hits.append(logits_of(model, output.last_hidden_state[:, -1]).argmax(-1) == target)
    hits_BA = torch.stack(hits, 1).cpu().numpy()
    return [row[: len(answer)] for row, answer in zip(hits_BA, answers, strict=True)]


def _cache_of(output: Any) -> Any:
    """Return the cache of a decoder's output, by one of transformers' names."""
    return output.get("past_key_values", output.get("cache_params"))

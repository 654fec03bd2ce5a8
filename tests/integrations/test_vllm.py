"""Models inside of vLLM: each request gets the tokens that `generate` returns alone."""

import importlib.util

import pytest
import torch

from loglinear.models import LogLinearForCausalLM
from loglinear.variants import VARIANTS
from tests.integrations.vllm_engine import answers, engine_of
from tests.models.tiny_models import (
    FULL,
    HYBRID,
    LINEAR,
    NO_GATE,
    ROUTED,
    ROUTED_DELTA,
    TRANSFORMER,
    tiny_config,
    tokens,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed: `make test-vllm` makes an environment for it",
    ),
]
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 17, 31, 64, 100]  # of prompts; chunks have 4 tokens
MODELS = {
    **{variant: {"variant": variant} for variant in VARIANTS},
    "linear": {"num_levels": 1},
    "hybrid": HYBRID,
    "transformer": TRANSFORMER,
    "routed": ROUTED,
    "routed_delta": ROUTED_DELTA,
    "routed_hybrid": {**ROUTED, "layer_types": [FULL, LINEAR]},
    "no_gate": NO_GATE,
    "tied": {"tie_word_embeddings": True},
    "safe_gate": {"variant": "kimi_delta_attention", "gate_lower_bound": -5.0},
}


def make(**options):
    torch.manual_seed(0)
    config = tiny_config(**{"attention_head_dim": 32, **options})  # vLLM's attention has no narrower heads
    return LogLinearForCausalLM(config).eval()


def requests(count):
    """Return prompts of different lengths and the lengths of their answers."""
    sizes = [LENGTHS[number % len(LENGTHS)] for number in range(count)]
    return [tokens(1, size, seed=number)[0].tolist() for number, size in enumerate(sizes)], [
        10 + 7 * number % 31 for number in range(count)
    ]


def check_equal_to_generate(model, llm, prompts, lengths):
    found = answers(llm, prompts, lengths)
    for prompt, length, answer in zip(prompts, lengths, found, strict=True):
        ids = torch.tensor([prompt])
        alone = model.generate(ids, max_new_tokens=length, do_sample=False, eos_token_id=None)
        assert list(answer.token_ids) == alone[0, len(prompt) :].tolist(), f"prompt of {len(prompt)} tokens"


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_requests_get_the_tokens_of_generate(options, tmp_path):
    """Prompts come in pieces of up to 13 tokens, between steps of the other requests."""
    model = make(**options)
    with engine_of(model, tmp_path, max_num_batched_tokens=13) as llm:
        check_equal_to_generate(model, llm, *requests(len(LENGTHS)))

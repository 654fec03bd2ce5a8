"""Models inside of vLLM: each request gets the tokens that `generate` returns alone."""

import importlib.util

import pytest
import torch

from loglinear.models import LogLinearForCausalLM
from loglinear.variants import VARIANTS
from tests.integrations.vllm_engine import answers, engine_of, preemptions, results
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
    "levels_without_a_block": {"num_levels": 15},  # 256 tokens have 9 levels
    "routed_levels_without_a_block": {**ROUTED, "num_levels": 20},
    "no_gate": NO_GATE,
    "tied": {"tie_word_embeddings": True},
    "safe_gate": {"variant": "kimi_delta_attention", "gate_lower_bound": -5.0},
}


def make(**options):
    torch.manual_seed(0)
    config = tiny_config(**{"attention_head_dim": 32, **options})  # vLLM's attention has no narrower heads
    return LogLinearForCausalLM(config).eval()


def requests(count):
    """Return prompts of different lengths, and the lengths of their answers."""
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


@pytest.mark.parametrize("options", [ROUTED, {**HYBRID, "num_heads": 2}], ids=["routed", "hybrid"])
def test_64_requests_join_and_leave(options, tmp_path):
    model = make(**options)
    with engine_of(model, tmp_path, max_num_seqs=17, max_num_batched_tokens=61) as llm:
        check_equal_to_generate(model, llm, *requests(64))


def test_more_rows_than_are_copied_at_once(tmp_path):
    model = make()
    with engine_of(model, tmp_path, max_num_seqs=90, max_num_batched_tokens=400) as llm:
        check_equal_to_generate(model, llm, [tokens(1, 1 + n % 5, seed=n)[0].tolist() for n in range(90)], [12] * 90)


@pytest.mark.parametrize("most", [37, 2048])
def test_requests_that_lost_their_pages_start_again(most, tmp_path):
    """Keys and values of the full-attention layer grow until there are too few pages."""
    model = make(**HYBRID)
    settings = dict(num_gpu_blocks_override=14, disable_log_stats=False, max_num_batched_tokens=most)
    with engine_of(model, tmp_path, **settings) as llm:
        prompts = [tokens(1, 100 + number, seed=number)[0].tolist() for number in range(8)]
        check_equal_to_generate(model, llm, prompts, [90] * 8)
        assert preemptions(llm) > 0


@pytest.mark.parametrize("options", [{}, ROUTED_DELTA, HYBRID], ids=["mamba2", "routed_delta", "hybrid"])
def test_repeated_beginnings_continue_from_stored_pages(options, tmp_path):
    model = make(**options)
    with engine_of(model, tmp_path, enable_prefix_caching=True, max_num_batched_tokens=300) as llm:
        shared = tokens(1, 200)[0].tolist()
        prompts = [shared[:length] + tokens(1, 9, seed=length)[0].tolist() for length in (200, 200, 150, 199)]
        check_equal_to_generate(model, llm, prompts, [30] * 4)
        check_equal_to_generate(model, llm, prompts[::-1], [30] * 4)
        assert results(llm, prompts[:1], [1])[0].num_cached_tokens >= 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, ROUTED_DELTA, HYBRID], ids=["mamba2", "routed_delta", "hybrid"])
def test_log_probabilities_are_as_exact_as_those_of_the_model(options, dtype, tmp_path):
    """The largest error against float64, for the tokens of prompts and of answers. The largest ratio was 1.26."""
    model = make(**options).to(dtype)
    prompts = [tokens(1, size, seed=size)[0].tolist() for size in (3, 30, 77)]
    with engine_of(model, tmp_path, dtype=str(dtype)[6:], max_num_batched_tokens=19) as llm:
        found = results(llm, prompts, [40] * 3, logprobs=0, prompt_logprobs=0)
    exact = make(**options).to(dtype).double()  # the weights are those of the model
    errors, own = [], []
    for result in found:
        ids = torch.tensor([[*result.prompt_token_ids, *result.outputs[0].token_ids]])
        entries = [*result.prompt_logprobs[1:], *result.outputs[0].logprobs]
        in_vllm = torch.tensor([entry[int(token)].logprob for entry, token in zip(entries, ids[0, 1:], strict=True)])
        with torch.no_grad():
            right, here = (m(ids).logits.double().log_softmax(-1)[0, :-1] for m in (exact, model))
        right, here = (x.gather(1, ids[0, 1:, None])[:, 0] for x in (right, here))
        errors.append((in_vllm - right).abs().max())
        own.append((here - right).abs().max())
    assert max(errors) <= 2 * max(own)


@pytest.mark.parametrize(
    "options, settings, message",
    [
        ({**ROUTED, "decode_top_k": 1}, {}, "decode_top_k must be None in vLLM"),
        ({}, {"tensor_parallel_size": 2}, "tensor_parallel_size must be 1 for log-linear models, got 2"),
        ({}, {"pipeline_parallel_size": 2}, "pipeline_parallel_size must be 1 for log-linear models, got 2"),
        ({}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding is not"),
        ({"attention_head_dim": 8, "layer_types": [LINEAR, FULL]}, {}, "attention_head_dim must be one of 32, "),
        ({}, {"quantization": "fp8"}, "quantization must be None for log-linear models, got 'fp8'"),
    ],
    ids=["top_k", "tensor_parallel", "pipeline_parallel", "speculative", "head_width", "quantization"],
)
def test_refusals_are_one_line_that_names_the_setting(options, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message), engine_of(make(**options), tmp_path, **settings):
        pass


def test_pages_have_the_levels_of_the_longest_sequence():
    from loglinear.integrations.vllm.pages import PageLayout

    config = tiny_config(num_levels=15)
    blocks = [PageLayout.of(config, length).parts[1].shape[0] for length in (4, 8, 256, 2**13, 2**20)]
    assert blocks == [1, 1, 6, 11, 12]  # 4 tokens are a chunk, and the last level holds all older tokens

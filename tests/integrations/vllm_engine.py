"""A model inside of vLLM, in this process, and its answers."""

import os
from contextlib import contextmanager

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the test's process
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

SETTINGS = dict(
    skip_tokenizer_init=True,
    dtype="float32",
    max_model_len=256,
    max_num_seqs=8,
    enforce_eager=True,
    enable_prefix_caching=False,
)


@contextmanager
def engine_of(model, folder, **settings):
    """Save a model and enter a context with vLLM's `LLM` of it."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    model.save_pretrained(folder)
    llm = LLM(str(folder), **{**SETTINGS, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def answers(llm, prompts, lengths, **sampling):
    """Return vLLM's greedy answers to prompts of tokens, each as many tokens as `lengths` says."""
    return [result.outputs[0] for result in results(llm, prompts, lengths, **sampling)]


def results(llm, prompts, lengths, **sampling):
    """Return vLLM's results of the same call."""
    from vllm import SamplingParams

    shared = dict(temperature=0, detokenize=False, ignore_eos=True, **sampling)
    return llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [SamplingParams(max_tokens=length, **shared) for length in lengths],
        use_tqdm=False,
    )


def preemptions(llm):
    """Return how many requests lost their pages before they had ended; the engine needs `disable_log_stats=False`."""
    return next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")

"""The models on a CUDA device: the CPU's answers in float64, and bf16 training through the real training path."""

import json
import os
import subprocess
import sys

import pytest
import torch

from loglinear.models import LogLinearCache, LogLinearForCausalLM
from loglinear.training import train
from loglinear.training.compilation import compile_blocks
from tests.models.tiny_models import KINDS, tiny_config, tokens
from tests.ops.operators import excess
from tests.training.tiny import tiny_recipe, write_text
from tests.waiting import waiting_is_an_error

pytestmark = pytest.mark.gpu


@KINDS
def test_gpu_logits_and_greedy_tokens_match_the_cpu(options):
    model = LogLinearForCausalLM(tiny_config(**options)).double().eval()
    ids = tokens(3, 37)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    expected = model(ids, attention_mask=mask).logits
    written = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    model.cuda()
    actual = model(ids.cuda(), attention_mask=mask.cuda()).logits.cpu()
    real = mask.bool()
    # rotary tables are float32 on either device; everything else is float64
    assert torch.allclose(actual[real], expected[real], rtol=0, atol=1e-5 if "layer_types" in options else 1e-9)
    on_gpu = model.generate(ids.cuda(), attention_mask=mask.cuda(), max_new_tokens=20, do_sample=False)
    assert torch.equal(on_gpu.cpu(), written)


@KINDS
@pytest.mark.parametrize("prefill_chunk_size", [None, 10])
def test_a_compiled_static_cache_generates_the_same(options, prefill_chunk_size):
    model = LogLinearForCausalLM(tiny_config(**{"chunk_size": 16, **options})).eval().cuda()
    ids = tokens(2, 37).cuda()
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    options = dict(attention_mask=mask, max_new_tokens=40, do_sample=False, prefill_chunk_size=prefill_chunk_size)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    static = model.generate(ids, cache_implementation="static", **options)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(static, model.generate(ids, **options))
    assert 0 < compiled <= 4  # not one for each of the 39 steps


@KINDS
@torch.no_grad()
def test_a_step_waits_for_nothing(options):
    """In eager mode, with a mask as `generate` gives it."""
    model = LogLinearForCausalLM(tiny_config(**{"chunk_size": 16, **options})).eval().cuda()
    ids, mask = tokens(2, 37).cuda(), torch.ones(2, 40, dtype=torch.long, device="cuda")
    mask[1, :20] = 0
    cache = LogLinearCache(model.config)
    model(ids, attention_mask=mask[:, :37], past_key_values=cache)
    model(ids[:, :1], attention_mask=mask[:, :38], past_key_values=cache)  # compiles
    with waiting_is_an_error():
        model(ids[:, :1], attention_mask=mask[:, :39], past_key_values=cache)
        model(ids[:, :1], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("read", [{}, {"radix": 4, "finest_block": 16, "routing": "gram"}], ids=["lambda", "routed"])
@pytest.mark.parametrize("variant", ["mamba2", "gated_delta_net"])
def test_compiled_blocks_of_the_kernels_start_anywhere_with_every_gradient(variant, read):
    options = dict(variant=variant, chunk_size=16, key_dim=16, head_dim=16, num_levels=9, **read)
    exact = LogLinearForCausalLM(tiny_config(**options, impl="torch")).double().cuda().train()
    twin, kernels = (
        LogLinearForCausalLM(tiny_config(**options, impl=impl)).cuda().train() for impl in ("torch", "triton")
    )
    for model in (twin, kernels):
        model.load_state_dict(exact.state_dict())
    torch._dynamo.reset()
    compile_blocks(kernels)
    for rows in (4, 7):
        ids, starts = tokens(rows, 90).cuda(), (37 * torch.arange(rows)).cuda()
        results = []
        for model in (exact, twin, kernels):
            logits = model(ids, initial_position=starts, use_cache=False).logits
            weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype, device="cuda").view_as(logits)
            results.append([logits, *torch.autograd.grad((logits * weights).sum(), list(model.parameters()))])
        for e, t, k in zip(*results, strict=True):
            assert excess(k, t, e, size=float(e.norm())) <= 20


@pytest.mark.parametrize("variant", ["mamba2", "gated_delta_net"])
def test_bf16_training_learns_on_the_gpu(variant, tmp_path):
    recipe = tiny_recipe(write_text(tmp_path / "text"), steps=40).override(variant=variant)
    result = train(recipe, tmp_path / "run", progress=False)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["split"] == "train"]
    assert result.step == 40 and losses[-1] < 0.6 * losses[0]


def test_two_compilations_train_the_same_bits(tmp_path):
    """Each process has an empty cache, so that the compiler chooses anew."""
    text = write_text(tmp_path / "text")
    code = (
        "import dataclasses, pathlib, sys; from loglinear.training import train\n"
        "from tests.training.tiny import tiny_recipe\n"
        "wide = dict(hidden_size=256, num_heads=8, head_dim=64, key_dim=64, intermediate_size=464)\n"
        "recipe = tiny_recipe(sys.argv[1], steps=5, compile=True, seq_len=1024, batch_tokens=4096)\n"
        "recipe = dataclasses.replace(recipe, model=recipe.model | wide)\n"
        "train(recipe, pathlib.Path(sys.argv[2]), progress=False)\n"
    )
    losses = []
    for run in ("first", "second"):
        caches = {name: str(tmp_path / f"{run}-{name}") for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        command = [sys.executable, "-c", code, str(text), str(tmp_path / run)]
        subprocess.run(command, env=os.environ | caches, check=True)
        records = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        losses.append([record["loss"] for record in records])
    assert losses[0] == losses[1]

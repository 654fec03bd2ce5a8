"""Models with a routed read: configuration, files, sizes, training, and the linear model that they start as."""

import dataclasses
import re

import pytest
import torch
from tiny_models import HYBRID, ROUTED, ROUTED_DELTA, ROUTED_GLA, ROUTED_KIMI, tiny_config, tokens

from loglinear.layers import BucketWeights
from loglinear.models import (
    LogLinearConfig,
    LogLinearForCausalLM,
    parameter_counts,
    set_decode_top_k,
    state_bytes,
)
from loglinear.ops import Partition
from loglinear.runs.loading import load_model
from loglinear.runs.metrics import read_metrics
from loglinear.training.train import train
from tests.training.tiny import tiny_recipe, write_text

BLOCKS = pytest.mark.parametrize(
    "options",
    [ROUTED, ROUTED_DELTA, HYBRID | ROUTED, ROUTED_GLA, ROUTED_KIMI],
    ids=["mamba2", "delta", "hybrid", "gla", "kimi"],
)
MISTAKES = [
    (dict(radix=3), "radix must be a power of two of at least 2, got 3"),
    (dict(radix=4, finest_block=12), "finest_block must be a power of two of at least 1, got 12"),
    (
        dict(radix=4, finest_block=4, largest_block=32),
        "largest_block must be finest_block = 4 times a power of radix = 4, got 32",
    ),
    (dict(routing="keys"), "routing must be one of gram, selective_gram or None, got 'keys'"),
    (dict(routing="gram", num_levels=1), "routing needs num_levels of at least 2, got 1"),
    (dict(routing="gram", routing_tau=float("inf")), "routing_tau must be a finite number of at least 0, got inf"),
    (dict(routing="gram", routing_tau=-1.0), "routing_tau must be a finite number of at least 0, got -1.0"),
    (dict(routing="gram", decode_top_k=0), "decode_top_k must be an integer of at least 1 or None, got 0"),
    (dict(decode_top_k=2), "decode_top_k needs routing, got 2 with routing=None"),
    (
        dict(radix=16, finest_block=8192),
        "the partition must have a finest_block of at most 4096, got 8192",
    ),
    (dict(radix=16, finest_block=64, num_levels=500), "num_levels must be at most 212, got 500"),
    (dict(num_levels=65), "num_levels must be at most 64, got 65"),
]


@pytest.mark.parametrize(
    "options, text", MISTAKES, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_mistakes_of_the_configuration_are_one_line(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        tiny_config(**options)


def test_the_partition_of_a_configuration() -> None:
    assert tiny_config().partition == tiny_config(finest_block=4).partition == Partition()  # lambdas are shared instead
    assert tiny_config(**ROUTED).partition == Partition(4, 4)
    assert tiny_config(finest_block=4, routing="gram").partition == Partition(2, 4)
    assert tiny_config(radix=4, finest_block=4, largest_block=16, num_levels=90).partition == Partition(4, 4, 16)


@pytest.mark.parametrize(
    "options", [ROUTED, ROUTED_DELTA, HYBRID | ROUTED, dict(radix=4, finest_block=4), ROUTED_GLA, ROUTED_KIMI]
)
def test_files_bring_back_every_bit(make_model, tmp_path, options: dict) -> None:
    model = make_model(torch.float32, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    loaded = LogLinearForCausalLM.from_pretrained(tmp_path).eval()
    ids = tokens(2, 40)
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert loaded.config.partition == model.config.partition and loaded.config.routing == model.config.routing
    narrow = LogLinearForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for name, p in narrow.named_parameters() if name.endswith("tau")} <= {torch.float32}


@pytest.mark.parametrize("routing", ["gram", "selective_gram"])
@pytest.mark.parametrize("variant", ["mamba2", "gated_delta_net", "gla", "kimi_delta_attention"])
def test_a_linear_checkpoint_becomes_a_routed_model_that_starts_as_it(
    make_model, tmp_path, variant: str, routing: str
) -> None:
    linear = make_model(torch.float32, num_levels=1, variant=variant)
    for parameter in linear.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    linear.save_pretrained(tmp_path)
    options = {**ROUTED, "routing": routing, "num_levels": 9, "routing_tau": 0.0}
    grown = LogLinearForCausalLM.from_pretrained(tmp_path, **options).eval()
    assert isinstance(grown.model.layers[0].mixer.bucket_weights, BucketWeights)
    logits = [model.double()(tokens(1, 90)).logits for model in (grown, linear)]
    torch.testing.assert_close(*logits, rtol=1e-10, atol=1e-10)
    for tau in (0.0, 0.5):  # the weights of keys count only in scores, and so only with a tau
        for name, parameter in grown.named_parameters():
            parameter.grad = None
            if name.endswith(".tau"):
                parameter.data.fill_(tau)
        grown(tokens(1, 90), labels=tokens(1, 90)).loss.backward()
        idle = {name for name, p in grown.named_parameters() if p.grad is None or not p.grad.any()}
        assert idle == {name for name in dict(grown.named_parameters()) if tau == 0 and ".key_weights." in name}


def test_a_model_from_scratch_scores_from_the_start(make_model) -> None:
    model = make_model(**ROUTED)
    taus = [p for name, p in model.named_parameters() if name.endswith("bucket_weights.score_bias.tau")]
    assert len(taus) == 2 and all((tau == 1).all() for tau in taus)
    assert (
        make_model(**ROUTED, routing_tau=0.0)(tokens(1, 50)).logits - model(tokens(1, 50)).logits
    ).abs().max() > 1e-3


@BLOCKS
def test_state_bytes_are_those_of_a_cache(make_model, options: dict) -> None:
    model = make_model(torch.float32, **options)
    cache = model(tokens(1, 37), use_cache=True).past_key_values
    history = 0 if cache.real is None else cache.real.nbytes
    assert state_bytes(model.config, 37, torch.float32) == cache.nbytes - history
    linear = tiny_config(**{**options, "routing": None})
    G, K, f, M = model.config.num_groups, 6, 4, model.config.num_levels - 1
    if options["routing"] == "selective_gram":
        G, K = 2 * G, K + 16
    layers = model.config.layer_types.count("linear_attention")
    sums = layers * (16 + 4 * (M * G * K * K + f * (2 * G * K + G)))
    assert state_bytes(model.config, 37, torch.float32) - state_bytes(linear, 37, torch.float32) == sums


def test_parameters_of_the_weights_are_counted() -> None:
    config = tiny_config(**ROUTED)
    D, H, L = config.hidden_size, config.num_heads, config.num_levels
    assert parameter_counts(config).level_scales == 2 * (D * H * L + H * L + H)


def test_tau_has_no_weight_decay(make_model) -> None:
    from transformers import Trainer

    model = make_model(torch.float32, **ROUTED)
    decayed = Trainer.get_decay_parameter_names(None, model)
    assert not [name for name in decayed if name.endswith("tau")] and any("proj.weight" in name for name in decayed)


@pytest.mark.parametrize("variant", ["mamba2", "gated_delta_net"])
def test_training_learns_a_tiny_task(tmp_path, variant: str) -> None:
    """By the trainer of this library, on packed documents."""
    recipe = tiny_recipe(write_text(tmp_path / "text"), steps=16, eval_every=8, save_every=16)
    options = dict(variant=variant, radix=4, finest_block=16, routing="gram", num_levels=4)
    recipe = dataclasses.replace(recipe, model={**recipe.model, **options})
    train(recipe, tmp_path / "run", progress=False)
    losses = [record["loss"] for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert losses[-1] < 0.9 * losses[0]
    assert load_model(tmp_path / "run").config.routing == "gram"


@pytest.mark.parametrize("starts", [None, [3, 21]], ids=str)
def test_a_compiled_block_gives_the_same_gradients(make_model, starts) -> None:
    torch._dynamo.reset()
    model, ids = make_model(**ROUTED).train(), tokens(2, 40)
    inputs = dict(input_ids=ids, labels=ids, initial_position=None if starts is None else torch.tensor(starts))
    plain = torch.autograd.grad(model(**inputs).loss, list(model.parameters()))
    for block in model.model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    compiled = torch.autograd.grad(model(**inputs).loss, list(model.parameters()))
    for a, e in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@BLOCKS
def test_decoding_may_read_few_buckets(make_model, tmp_path, options: dict) -> None:
    """A saved model keeps the number, and a loaded one takes another. It changes steps alone."""
    model, ids = make_model(**options, decode_top_k=1), tokens(2, 90)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    few = LogLinearForCausalLM.from_pretrained(tmp_path).double().eval()
    every = LogLinearForCausalLM.from_pretrained(tmp_path, decode_top_k=None).double().eval()
    assert (few.config.decode_top_k, every.config.decode_top_k) == (1, None)
    with torch.no_grad():
        assert torch.equal(few(ids).logits, every(ids).logits)  # a prompt reads every bucket
        caches = [loaded(ids[:, :79]).past_key_values for loaded in (few, every)]
        steps = [
            loaded(ids[:, 79:80], past_key_values=c).logits for loaded, c in zip((few, every), caches, strict=True)
        ]
        assert not torch.allclose(*steps)
    expected = every.generate(ids[:, :50], max_new_tokens=9, do_sample=False)
    set_decode_top_k(few, few.config.num_levels - 1)
    assert torch.equal(few.generate(ids[:, :50], max_new_tokens=9, do_sample=False), expected)
    set_decode_top_k(few, 1)
    with pytest.raises(ValueError, match="^decode_top_k must be None in training, which reads all buckets, got 1: "):
        few.train()(ids, labels=ids)
    set_decode_top_k(few, None)
    few(ids, labels=ids).loss.backward()


def test_models_without_routing_read_what_lambda_says(make_model) -> None:
    text = "decode_top_k needs a model with routing, LogLinearForCausalLM has no routed layer"
    with pytest.raises(ValueError, match=f"^{text}$"):
        set_decode_top_k(make_model(), 2)


def test_older_configurations_have_no_routing() -> None:
    old = {
        name: value
        for name, value in tiny_config().to_dict().items()
        if "rout" not in name and name not in ("radix", "decode_top_k")
    }
    config = LogLinearConfig(**old)
    assert (config.radix, config.largest_block, config.routing, config.partition) == (2, None, None, Partition())

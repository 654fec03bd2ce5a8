"""The cells: sizes of the models as published, what distinguishes twins, and how many there are."""

import json

import pytest
import torch

from loglinear.evaluation.mqar.cells import DIMS, PROTOCOLS, RecallCell, RecallTable, RecallTask, get_task
from loglinear.evaluation.mqar.models import (
    ABLATIONS,
    ALL_MODELS,
    CHOICES,
    CONTROLS,
    KEY_STEP,
    LINEAR_MODELS,
    MODELS,
    decode_bytes,
)
from loglinear.fenwick import level
from loglinear.models import LogLinearConfig, LogLinearForCausalLM, parameter_counts, state_bytes
from loglinear.partition import LARGEST_CHUNK
from loglinear.variants import HeadSizes

HEADS = {  # heads, query/key groups, key dimension, head dimension
    ("mamba2", 16): HeadSizes(2, 1, 16, 16),
    ("mamba2", 32): HeadSizes(4, 1, 16, 16),
    ("mamba2", 64): HeadSizes(8, 1, 16, 16),
    ("gated_delta_net", 16): HeadSizes(1, 1, 16, 32),
    ("gated_delta_net", 32): HeadSizes(2, 2, 16, 32),
    ("gated_delta_net", 64): HeadSizes(2, 2, 32, 64),
}


def cell(**changes):
    return RecallCell(**{"model": "mamba2", "dim": 16, "learning_rate": 1e-2, "seed": 0, **changes})


@pytest.mark.parametrize(("model", "dim"), HEADS)
def test_sizes_of_the_recurrent_models(model, dim):
    linear, log_linear = (cell(model=name, dim=dim).model_config() for name in (model, f"log_linear_{model}"))
    assert linear.variant == log_linear.variant == model and linear.heads == log_linear.heads == HEADS[model, dim]
    assert (linear.num_levels, log_linear.num_levels) == (1, 9)  # 256 tokens: the token itself and eight sizes of block
    for config in (linear, log_linear):
        assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (8192, dim, 2)
        assert config.intermediate_size == 0 and config.layer_types == ["linear_attention"] * 2
    counts = [parameter_counts(config) for config in (linear, log_linear)]
    assert counts[0].embeddings == 8192 * dim  # tied
    lambdas = 2 * (dim + 1) * linear.num_heads * 9
    assert counts[1].level_scales == lambdas and counts[1].total - counts[0].total == lambdas


@pytest.mark.parametrize("dim", DIMS)
def test_attention_has_one_head_of_the_whole_dimension_and_nothing_else(dim):
    config = cell(model="attention", dim=dim).model_config()
    assert config.layer_types == ["full_attention"] * 2
    assert (config.num_attention_heads, config.num_key_value_heads, config.attention_head_dim) == (1, 1, dim)
    names = [name for name, _ in LogLinearForCausalLM(config).model.layers.named_parameters()]
    assert {name.split(".", 1)[1] for name in names} == {
        "mixer_norm.weight",
        "mixer.qkv_proj.weight",
        "mixer.out_proj.weight",
    }


def test_ablations_change_one_choice_of_a_log_linear_model():
    for name in ABLATIONS:
        base, choice = name.rsplit("_", 1)
        changed, original = (cell(model=model).model_config().to_dict() for model in (name, base))
        differing = {key for key in original if changed[key] != original[key]}
        assert len(differing) == 1 and differing <= set(CHOICES[choice]) and original["lambda_form"] == "softplus"


def test_controls_differ_from_the_linear_model_in_the_key_dimension_alone():
    for name in CONTROLS:
        base = "mamba2" if name.startswith("mamba2") else "gated_delta_net"
        control, linear = (cell(model=model, dim=32).model_config().to_dict() for model in (name, base))
        assert {key for key in linear if control[key] != linear[key]} == {"key_dim"}
        if "_states" in name:
            assert control["key_dim"] == int(name.rpartition("_states")[2]) * linear["key_dim"]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("variant", ["mamba2", "gated_delta_net"])
def test_control_of_equal_bytes_has_the_narrowest_keys_that_give_it_as_many(variant, dim):
    published, control = (cell(model=name, dim=dim) for name in (f"log_linear_{variant}", f"{variant}_equal_bytes"))
    config = control.model_config()
    narrower = LogLinearConfig(**{**config.to_dict(), "key_dim": config.key_dim - KEY_STEP})
    assert decode_bytes(narrower, 256) < published.decode_bytes <= control.decode_bytes
    assert control.decode_bytes < 1.1 * published.decode_bytes


@pytest.mark.parametrize("model", ["mamba2", "log_linear_gated_delta_net", "attention", "mamba2_equal_bytes"])
def test_decode_bytes_are_those_of_the_smallest_cache_of_any_chunk_size(model):
    task = RecallTask(length=24, pairs=(2,), vocab_size=32)
    small = cell(model=model, task=task)
    caches = []
    for chunk_size in (1, 2, 4, 8, 16, 32):
        config = LogLinearConfig(**{**small.model_config().to_dict(), "chunk_size": chunk_size})
        with torch.no_grad():
            output = LogLinearForCausalLM(config)(torch.zeros(1, 24, dtype=torch.long), use_cache=True)
        caches.append(output.past_key_values.nbytes)
    assert small.decode_bytes == min(caches)
    assert small.cache_bytes == cell(model="attention", task=task).decode_bytes == 2 * 2 * 24 * 16 * 4


@pytest.mark.parametrize("model", ["mamba2", "log_linear_mamba2", "routed_mamba2", "mamba2_equal_bytes"])
def test_decode_bytes_of_examples_longer_than_the_largest_chunk(model):
    task = RecallTask(length=2 * LARGEST_CHUNK, pairs=(4,))
    long = cell(model=model, task=task)
    config = long.model_config()
    sizes = []
    for exponent in range(LARGEST_CHUNK.bit_length()):
        same = LogLinearConfig(**{**config.to_dict(), "chunk_size": 1 << exponent})
        sizes.append(state_bytes(same, task.length, torch.float32))
    assert long.decode_bytes == min(sizes)


def test_bytes_of_an_adapted_model_are_its_own(monkeypatch):
    linear = cell().decode_bytes

    def adapt(model, length): ...

    for name, own in (("silent", None), ("known", lambda config, tokens: 3 * linear + tokens)):
        monkeypatch.setitem(ALL_MODELS, name, MODELS["mamba2"]._replace(adapt=adapt, decode_bytes=own))
        monkeypatch.setitem(ALL_MODELS, f"{name}_equal_bytes", MODELS["mamba2"]._replace(bytes_of=name))
    assert cell(model="silent").decode_bytes is None and cell(model="known").decode_bytes == 3 * linear + 256
    assert 3 * linear + 256 <= cell(model="known_equal_bytes").decode_bytes < 4 * linear
    with pytest.raises(ValueError, match="silent_equal_bytes needs the decode bytes of silent, which are not known"):
        cell(model="silent_equal_bytes").model_config()


def test_an_adapted_model_must_take_the_positions_of_a_jittered_task(monkeypatch):
    adapted = MODELS["mamba2"]._replace(adapt=lambda model, length: None)
    monkeypatch.setitem(ALL_MODELS, "adapted", adapted)
    monkeypatch.setitem(ALL_MODELS, "taking", adapted._replace(takes_positions=True))
    assert cell(model="taking", task=get_task("jittered")).task.jitter and not cell(model="adapted").task.jitter
    with pytest.raises(ValueError, match="a jittered task needs a model that starts at any position, got adapted"):
        cell(model="adapted", task=get_task("jittered"))


def test_cell_survives_json():
    changed = cell(learning_rate=3e-3, task=RecallTask(pairs=(2, 4), epochs=1))
    assert RecallCell.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed


def test_table_sweeps_with_one_seed_and_repeats_the_best_with_the_others():
    table, own = RecallTable(seeds=(2, 0, 1)), PROTOCOLS["loglinear"]
    assert len(table) == len(MODELS) * len(DIMS) * (len(own.learning_rates) + len(own.seeds) - 1) == 75
    assert len(table.groups()) == 15 and table.groups()[0][1] == 64
    sweep, repeats = table.sweep("mamba2", 32), table.repeats("mamba2", 32, 1e-2)
    assert [(c.learning_rate, c.seed) for c in sweep] == [(rate, 0) for rate in own.learning_rates]
    assert [(c.learning_rate, c.seed) for c in repeats] == [(1e-2, 1), (1e-2, 2)]
    everything = [c for group in table.groups() for c in table.sweep(*group) + table.repeats(*group, 1e-2)]
    assert len({c.name for c in everything}) == len(everything) == 75


def test_zoology_chooses_a_rate_by_three_seeds_and_reports_five_others():
    task = RecallTask(protocol="zoology", examples=20_000)
    table = RecallTable(models=("mamba2",), dims=(32,), task=task)
    sweep, repeats = table.sweep("mamba2", 32), table.repeats("mamba2", 32, 8e-3)
    assert {c.learning_rate for c in sweep} == {1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2}
    assert {c.seed for c in sweep} == {0, 1, 2} and [c.seed for c in repeats] == [3, 4, 5, 6, 7]
    assert len(table) == len(sweep) + len(repeats) == 23
    one = RecallTable(models=("mamba2",), dims=(32,), learning_rates=(8e-3,), seeds=(4,), task=task)
    assert one.sweep("mamba2", 32) == [] and [c.seed for c in one.repeats("mamba2", 32, 8e-3)] == [4]
    tuned = RecallTable(models=("mamba2",), dims=(32,), learning_rates=(8e-3,), seeds=(0,), task=task)  # no choice
    assert [c.seed for c in tuned.repeats("mamba2", 32, 8e-3)] == [0]


def test_zoology_has_short_sequences_of_few_pairs_and_more_of_them():
    task = RecallTask(protocol="zoology", examples=20_000)
    assert task.settings(training=True) == [
        (4, 64, 100_000), (8, 128, 20_000), (16, 256, 20_000), (32, 256, 20_000), (64, 256, 20_000)
    ]  # fmt: skip
    assert {setting.examples for setting in task.settings(training=False)} == {task.test_examples}
    assert task.steps_per_epoch == 391 + 4 * 79
    assert {length for _, length, _ in RecallTask().settings(training=True)} == {256}


def test_a_jittered_task_has_the_levels_of_every_start():
    for length in (2, 250, 256, 258):
        task = RecallTask(length=4 * length, pairs=(1,), jitter=True)
        assert task.starts >= task.length > task.starts // 2
        config = cell(model="log_linear_mamba2", task=task).model_config()
        assert config.num_levels == max(level(task.starts - 1 + task.length - 1, s) for s in range(task.starts)) + 1
    assert (RecallTask().starts, RecallTask().positions) == (1, 256)
    jittered = cell(model="log_linear_mamba2", task=get_task("jittered"))
    assert jittered.model_config().num_levels == 12 and RecallCell.from_dict(jittered.to_dict()) == jittered
    assert all(pairs & (pairs - 1) for pairs in jittered.task.pairs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cell(model="mamba"), "unknown model 'mamba': did you mean 'mamba2'"),
        (lambda: cell(dim=24), "dim must be a multiple of 16 up to 4096, got 24"),
        (lambda: cell(learning_rate=0.0), "learning rate must be positive and at most 1, got 0.0"),
        (lambda: cell(seed=-1), "seed must lie between 0 and 4294967295, got -1"),
        (
            lambda: RecallTask(protocol="zoo"),
            "unknown protocol 'zoo': did you mean 'zoology'. There are loglinear, zoology",
        ),
        (lambda: get_task("jitter"), "unknown task 'jitter': did you mean 'jittered'. There are standard, jittered"),
        (lambda: RecallTask(epochs=0), "epochs must lie between 1 and 2147483647, got 0"),
        (lambda: RecallTask(pairs=(4, 0)), "pairs must be one or more different positive numbers"),
        (lambda: RecallTask(pairs=(4, 4)), "pairs must be one or more different positive numbers"),
        (lambda: RecallTask(pairs=(64,), vocab_size=128), "vocab_size must be more than twice the pairs"),
        (
            lambda: cell(model="log_linear_mamba2_blocks", task=RecallTask(length=64, pairs=(4,))),
            "length must be more than 64 tokens for log_linear_mamba2_blocks, got 64",
        ),
        (lambda: RecallTask(length=30, pairs=(4, 8)), "length must be even and at least 4 times the pairs"),
        (lambda: RecallTable(seeds=(1, 1)), "seeds must be one or more different values"),
        (
            lambda: RecallTable(seeds=(0, 3), task=RecallTask(protocol="zoology")),
            r"seeds must not be tuning seeds \(0, 1, 2\) of protocol 'zoology', .* got 0",
        ),
        (lambda: RecallTable(dims=(16, 17)), "dim must be a multiple of 16 up to 4096, got 17"),
    ],
)
def test_impossible_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("model", LINEAR_MODELS)
def test_routed_models_add_the_read_alone(model):
    linear, routed = (cell(model=name).model_config().to_dict() for name in (model, f"routed_{model}"))
    assert {name for name in linear if linear[name] != routed[name]} == {
        "num_levels", "radix", "finest_block", "routing",
    }  # fmt: skip
    assert routed["num_levels"] == 16  # the own 16 tokens, and 15 blocks before the last of 256
    jittered = cell(model=f"routed_{model}", task=get_task("jittered")).model_config()
    assert jittered.num_levels == jittered.partition.num_columns(2047) == 1 + 15 + 7


def test_bytes_of_a_routed_model_are_its_states_and_its_sums():
    """Dimension 32, Mamba-2: 4 heads of 16 x 16, 15 blocks, chunks of 16, two layers."""
    states = 16 + 4 * (15 * 4 * 16 * 16 + 16 * (16 + 4 * 16 + 4))
    sums = 16 + 4 * (15 * 16 * 16 + 16 * (2 * 16 + 1))
    convolution = 4 * 3 * (2 * 16 + 4 * 16)
    assert cell(model="routed_mamba2", dim=32).decode_bytes == 2 * (states + sums + convolution)

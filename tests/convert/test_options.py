"""Every option of every format with values that mean nothing: each is one line, and none another error."""

import json

import pytest

from loglinear.convert.formats import get_format
from loglinear.convert.source import Options, Tensors
from loglinear.convert.target import build, configuration
from tests.convert import test_state_spaces as state_spaces
from tests.convert.checkpoints import write_checkpoint
from tests.convert.fla_checkpoints import (
    decoder_config,
    decoder_tensors,
    delta_shapes,
    gla_shapes,
    mamba2_config,
    mamba2_tensors,
)
from tests.convert.test_transformers import mamba2

VALUES = [None, -1, 0, 3, 10**30, 1e308, 1e-320, float("nan"), float("inf"), "x", [], [0], {}, {"layers": []}, True]
ATTENTION = {"layers": [1], "num_heads": 4}
HEADS = (3, 3, 6, 9)


def gated(levels):
    return decoder_tensors(lambda layer, at: delta_shapes(at, HEADS, levels=levels))


def plain():
    return decoder_tensors(lambda layer, at: delta_shapes(at, (3, 3, 8, 8), gates="b", gate=False))


GATED = dict(head_dim=6, num_heads=3, expand_v=1.5, num_v_heads=None, use_gate=True, allow_neg_eigval=False)
CHECKPOINTS = {
    "state-spaces": lambda: (state_spaces.CONFIG, state_spaces.tensors_of(state_spaces.CONFIG)),
    "fla mamba2": lambda: (mamba2_config("mamba2"), mamba2_tensors()),
    "fla log_linear_mamba2": lambda: (
        mamba2_config("log_linear_mamba2"),
        mamba2_tensors(norm="mixer_norm", levels=15),
    ),
    "fla gated_deltanet": lambda: (decoder_config("gated_deltanet", **GATED), gated(0)),
    "fla delta_net": lambda: (decoder_config("delta_net", num_heads=3, expand_k=1, use_beta=True), plain()),
    "fla gla": lambda: (
        decoder_config("gla", num_heads=3, num_kv_heads=3, use_gk=True, clamp_min=None, use_output_gate=True),
        decoder_tensors(lambda layer, at: gla_shapes(at, (3, 3, 4, 8), key_value_heads=3)),
    ),
    "authors hattention": lambda: (mamba2_config("hattention", 1), mamba2_tensors(1, "mixer_norm", 15)),
    "authors h_gated_deltanet": lambda: (decoder_config("h_gated_deltanet", **GATED), gated(7)),
}


def changed(config):
    """The configuration with each option, also inside objects, at each value."""
    for name, old in config.items():
        for value in VALUES:
            yield {**config, name: value}
        if isinstance(old, dict):
            yield from ({**config, name: part} for part in changed(old))


def read(source, folder, config, tensors):
    library, options = get_format(source), Options(str(folder), config)
    converted = library.reader(options)(options, tensors)
    options.check_all_known()
    tensors.check_all_taken()
    return build(configuration(converted.fields, {}), converted)


@pytest.mark.parametrize("name", ["transformers mamba2", *CHECKPOINTS])
def test_an_option_without_sense_is_one_line(tmp_path, name):
    folder = tmp_path / "in"
    if name in CHECKPOINTS:
        config, weights = CHECKPOINTS[name]()
        write_checkpoint(folder, config, weights)
    else:
        mamba2(folder, n_groups=1)
        config = json.loads((folder / "config.json").read_text())
    source, whole = name.split()[0], Tensors(folder, pickle=False)
    all_tensors, outcomes = whole.left, []
    for each in [config, *changed(config), *({**config, "attn": part} for part in changed(ATTENTION))]:
        whole.left = dict(all_tensors)
        try:
            read(source, folder, each, whole)
            outcomes.append(True)
        except ValueError as error:
            assert "\n" not in str(error), each
            outcomes.append(False)
    assert outcomes[0] and 0.1 < sum(outcomes) / len(outcomes) < 0.9

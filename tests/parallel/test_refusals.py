"""Models refuse slices together with anything that they would not compute exactly."""

import pytest
import torch

from loglinear import parallel
from loglinear.layers import Mixer, Packing
from loglinear.models import (
    LogLinearCache,
    LogLinearForCausalLM,
    LogLinearForSequenceClassification,
    LogLinearForTokenClassification,
    LogLinearModel,
)
from loglinear.parallel import Slices
from loglinear.variants import HeadSizes
from tests.models.tiny_models import HYBRID, tiny_config, tokens

SLICES = Slices.plan(16, 2, chunk_size=4)
CACHE = LogLinearCache(tiny_config())


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (HYBRID, {"output_attentions": True}, "output_attentions must be left out with slices"),
        (HYBRID, {"use_cache": True}, "use_cache must be left out with slices"),
        ({}, {"use_cache": True}, "use_cache must be left out with slices"),
        ({}, {"initial_position": torch.tensor([4, 4])}, "initial_position must be left out with slices"),
        ({}, {"attention_mask": torch.ones(2, 8)}, "attention_mask must be None with slices"),
        ({}, {"cu_seqlens": torch.tensor([0, 8])}, "cu_seqlens must be None with slices"),
        ({}, {"seq_idx": torch.zeros(1, 8)}, "seq_idx must be None with slices"),
        ({}, {"past_key_values": CACHE}, "past_key_values must be None with slices"),
        ({}, {"input_ids": tokens(2, 16)}, r"input_ids must have the 8 tokens of this rank's slice, got \[2, 16\]"),
    ],
)
@pytest.mark.parametrize("model", [LogLinearModel, LogLinearForCausalLM])
def test_models_refuse_what_slices_exclude(model, options, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(tiny_config(**options))(**{"input_ids": tokens(2, 8), "slices": SLICES, **arguments})


def test_labels_that_are_not_shifted_are_refused():
    """The last token of a slice would have no target."""
    with pytest.raises(ValueError, match="labels must be None with slices: pass shift_labels"):
        LogLinearForCausalLM(tiny_config())(input_ids=tokens(2, 8), labels=tokens(2, 8), slices=SLICES)


@pytest.mark.parametrize("model", [LogLinearForSequenceClassification, LogLinearForTokenClassification])
def test_heads_of_whole_rows_refuse_slices(model):
    with pytest.raises(ValueError, match=f"slices need a LogLinearForCausalLM or LogLinearModel, got {model.__name__}"):
        model(tiny_config())(input_ids=tokens(2, 8), slices=SLICES)


def test_a_mixer_refuses_states_and_slices_together():
    mixer = Mixer(8, HeadSizes(2, 1, 4, 4), variant="mamba2", num_levels=3, chunk_size=4)
    x = torch.randn(2, 8, 8)
    for arguments in ({"return_state": True}, {"state": mixer.empty_state(2, x)}):
        with pytest.raises(ValueError, match="slices exclude states"):
            mixer(x, slices=SLICES, **arguments)


@pytest.mark.parametrize("kernel", [1, 4])
@pytest.mark.parametrize(
    ("packed", "documents", "message"),
    [
        (None, (0, 3, 16), "be made from slices.cu_seqlens, with the 2 documents of this slice, got None"),
        ((0, 5, 8), None, "be None for slices without cu_seqlens, got one of 2 documents"),
        ((0, 7), (0, 3, 16), "be made from slices.cu_seqlens, with the 2 documents of this slice, got 1"),
    ],
)
def test_a_mixer_refuses_a_packing_of_other_documents_than_those_of_the_slice(kernel, packed, documents, message):
    mixer = Mixer(8, HeadSizes(2, 1, 4, 4), variant="mamba2", num_levels=3, chunk_size=4, conv_kernel=kernel)
    packing = None if packed is None else Packing.from_cu_seqlens(torch.tensor(packed), packed[-1], kernel)
    slices = Slices.plan(16, 2, chunk_size=4, cu_seqlens=documents)
    x = torch.randn(1, slices.length, 8)
    with pytest.raises(ValueError, match=f"^packing must {message}$"):
        mixer(x, packing, slices=slices)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": object()}, "config must be a LogLinearConfig, got object"),
        ({"input_ids": tokens(1, 8)[0]}, r"input_ids must have shape \[B, T\], got \[8\]"),
        ({"mesh": None}, "mesh must be a DeviceMesh of one dimension"),
    ],
)
def test_shard_names_the_argument_that_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        parallel.shard(**{"config": tiny_config(), "mesh": None, "input_ids": tokens(1, 8), **arguments})

"""Options of the Mamba-2 mixers: every one changes nothing in an upgrade, or is refused by name."""

import pytest
import torch

import loglinear
from loglinear.upgrades.places import CACHES
from tests.upgrades.tiny import LEVELS, close, original, tokens, trained, upgraded, wide

OPTIONS = [
    ("mamba2", dict(time_step_limit=(0.4, 0.8))),
    ("mamba2", dict(use_bias=True, use_conv_bias=False)),
    ("mamba2", dict(n_groups=4, conv_kernel=2, tie_word_embeddings=True)),
    ("mamba2", dict(n_groups=1, conv_kernel=1, residual_in_fp32=False)),
    ("bamba", dict(time_step_limit=(0.0, 1.2), mamba_proj_bias=True, mamba_conv_bias=False)),
    ("granitemoehybrid", dict(num_local_experts=0, mamba_n_groups=4)),
    ("granitemoehybrid", dict(time_step_limit=[0.9, 1.5], mamba_proj_bias=True, position_embedding_type=None)),
    ("falcon_h1", dict(mamba_rms_norm=True, mamba_norm_before_gate=True)),
    ("falcon_h1", dict(mamba_rms_norm=True, mamba_norm_before_gate=False, projectors_bias=True)),
    ("falcon_h1", dict(time_step_limit=(1.0, 2.0), mamba_proj_bias=True, mamba_conv_bias=False)),
    ("nemotron_h", dict(time_step_min=0.02, use_bias=True, use_conv_bias=False)),
    ("zamba2", dict(time_step_min=0.02, add_bias_linear=True)),
    ("zamba2", dict(num_mem_blocks=2, use_shared_attention_adapter=True, mamba_ngroups=1)),
]


@pytest.mark.parametrize(("family", "options"), OPTIONS, ids=str)
@torch.no_grad()
def test_options_keep_the_logits(family, options):
    theirs, ids = original(family, **options), tokens(2, 75)
    with wide():
        assert close(upgraded(theirs)(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize(
    ("family", "options"), [case for case in OPTIONS if any("time_step" in name for name in case[1])]
)
@torch.no_grad()
def test_limits_of_time_steps_hold_in_single_steps(family, options):
    """transformers forgets them there."""
    ids = tokens(2, 20)
    with wide():
        model = trained(original(family, **options))
        right = model(ids, use_cache=False).logits
        first = model(ids[:, :12], use_cache=True)
        name = "cache_params" if "cache_params" in first else "past_key_values"
        parts = [first.logits, *(model(token, **{name: first[name]}).logits for token in ids[:, 12:].split(1, 1))]
        assert close(torch.cat(parts, 1), right)
        unlimited = trained(original(family))
        assert not close(unlimited(ids).logits, right)


@pytest.mark.parametrize(
    ("family", "option"), [("mamba2", "hidden_act"), ("bamba", "hidden_act"), ("nemotron_h", "mamba_hidden_act")]
)
def test_other_activations_are_refused(family, option):
    model = original(family, **{option: "relu"})
    with pytest.raises(ValueError) as caught:
        loglinear.upgrade(model, **LEVELS)
    assert (
        str(caught.value) == f"{type(model).__name__} cannot be upgraded exactly: {option}='relu' (silu is supported)"
    )


@torch.no_grad()
def test_the_common_name_of_the_cache_is_understood():
    model, ids, more = trained(original("mamba2")), tokens(1, 9), tokens(1, 3, seed=2)
    with wide():
        one, other = (model(ids, use_cache=True).cache_params for _ in range(2))
        with pytest.raises(ValueError, match="past_key_values and cache_params are two names of the cache"):
            model(more, cache_params=one, past_key_values=other)
        assert torch.equal(model(more, past_key_values=one).logits, model(more, cache_params=other).logits)
        states = [model.backbone(more, **{name: cache})[0] for name, cache in zip(CACHES, (one, other), strict=True)]
        assert torch.equal(*states)


def test_training_makes_no_cache_unless_it_is_asked_for():
    model, ids = upgraded(original("mamba2")).train(), tokens(1, 9)
    with wide():
        assert model(ids).cache_params is None
        assert model(ids, use_cache=True).cache_params is not None

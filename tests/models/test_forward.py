import pytest
import torch
from tiny_models import HYBRID, KINDS, tiny_config, tokens

from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.variants import VARIANTS

T = 29


@KINDS
def test_causality(make_model, options: dict) -> None:
    model, ids = make_model(**options), tokens(1, T)
    changed = ids.clone()
    changed[:, 20:] = 39 - changed[:, 20:]
    torch.testing.assert_close(model(changed).logits[:, :20], model(ids).logits[:, :20], rtol=0, atol=1e-12)


@KINDS
@pytest.mark.parametrize("naming", ["cu_seqlens", "cu_seq_lens_q", "seq_idx"])
def test_packed_is_separate(make_model, options: dict, naming: str) -> None:
    model, ids = make_model(**options), tokens(1, T)
    cuts = [0, 1, 10, 13, T]
    boundaries = torch.tensor(cuts, dtype=torch.int32)
    if naming == "seq_idx":
        boundaries = torch.arange(4).repeat_interleave(boundaries.diff())[None]
    packed = model(ids, **{naming: boundaries}).logits
    separate = torch.cat([model(ids[:, a:b]).logits for a, b in zip(cuts[:-1], cuts[1:], strict=True)], 1)
    torch.testing.assert_close(packed, separate, rtol=1e-11, atol=1e-11)


@KINDS
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_rows_give_what_they_give_alone(make_model, options: dict, side: str) -> None:
    model, lengths = make_model(**options), [T, 11, 3]
    starts = {"left": [0, T - 11, T - 3], "right": [0, 0, 0], "both": [0, 7, 20]}[side]
    ids, mask = tokens(3, T), torch.zeros(3, T, dtype=torch.long)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        mask[row, start : start + length] = 1
    logits = model(ids, attention_mask=mask).logits
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        part = slice(start, start + length)
        alone = model(ids[row : row + 1, part]).logits[0]
        torch.testing.assert_close(logits[row, part], alone, rtol=1e-11, atol=1e-11)


def test_the_whole_model_with_unit_lambda_starts_as_its_linear_twin(make_model) -> None:
    model, twin = make_model(lambda_form="unit"), make_model(num_levels=1)
    missing = twin.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys and all("level_scales" in name for name in missing.unexpected_keys)
    ids = tokens(2, T)
    torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-10, atol=1e-10)


def test_chunk_size_and_implementation_change_no_result(make_model) -> None:
    ids = tokens(2, T)
    expected = make_model(impl="reference").forward(ids).logits
    for chunk_size in (1, 8, 64):
        torch.testing.assert_close(make_model(chunk_size=chunk_size)(ids).logits, expected, rtol=1e-10, atol=1e-10)


def test_embeddings_give_what_their_ids_give(make_model) -> None:
    model, ids = make_model(), tokens(2, 9)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 7])])
def test_logits_to_keep_keeps_those(make_model, keep) -> None:
    model, ids = make_model(), tokens(2, 9)
    full = model(ids).logits
    expected = full[:, keep] if isinstance(keep, torch.Tensor) else full[:, -keep:]
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, expected)


def test_hidden_states_and_tuples(make_model) -> None:
    model, ids = make_model(), tokens(2, 9)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    torch.testing.assert_close(model(ids, return_dict=False)[0], output.logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_stays_near_float32(make_model, variant: str) -> None:
    model, ids = make_model(torch.float32, variant=variant), tokens(2, T)
    expected = model(ids).logits
    actual = model.bfloat16()(ids).logits
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        (
            {"input_ids": tokens(2, 6), "position_ids": torch.tensor([[0]])},
            r"position_ids must have shape \[2, 6\] or \[1, 6\], got \[1, 1\]",
        ),
        ({"input_ids": tokens(1, 6), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, "position_ids restart"),
        ({"input_ids": tokens(2, 6), "cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens describes .* a batch of 2"),
        ({"input_ids": tokens(1, 6), "cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens must rise from 0 to .* \\(6\\)"),
        ({"input_ids": tokens(1, 6), "cu_seqlens": torch.tensor([0, 4, 3, 6])}, "cu_seqlens must rise"),
        ({"input_ids": tokens(1, 6), "seq_idx": torch.zeros(1, 5)}, "seq_idx must have one entry per token"),
        ({"input_ids": tokens(2, 6), "attention_mask": torch.ones(2, 5)}, r"attention_mask must have shape \[2, 6\]"),
        (
            {"input_ids": tokens(1, 6), "cu_seqlens": torch.tensor([0, 6]), "attention_mask": torch.eye(6)[:1]},
            "attention_mask must not mark padding in a packed batch",
        ),
        (
            {"input_ids": tokens(1, 6), "cu_seqlens": torch.tensor([0, 6]), "attention_mask": torch.ones(1, 5)},
            r"attention_mask must have shape \[1, 6\] .* got \[1, 5\]",
        ),
        (
            {"input_ids": tokens(1, 6), "cu_seqlens": torch.tensor([0, 2, 6]), "seq_idx": torch.zeros(1, 6)},
            "cu_seqlens and seq_idx must describe the same documents",
        ),
        (
            {
                "input_ids": tokens(1, 6),
                "cu_seq_lens_q": torch.tensor([0, 6]),
                "cu_seq_lens_k": torch.tensor([0, 2, 6]),
            },
            "cu_seq_lens_q and cu_seq_lens_k must describe the same documents",
        ),
        (
            {"input_ids": tokens(1, 6), "cu_seqlens": torch.tensor([0, 2, 6]), "max_length_q": 3},
            "max_length_q must be at least 4, the longest document, got 3",
        ),
        ({"input_ids": tokens(1, 6), "max_length_k": 6}, "max_length_k must go with boundaries of documents, got 6"),
        (
            {"input_ids": tokens(1, 6), "attention_mask": torch.tensor([[-torch.inf, 0, 0, 0, 0, 0]])},
            "attention_mask must hold 1 at tokens and 0 at padding, got other values",
        ),
        (
            {"input_ids": tokens(1, 6), "attention_mask": torch.full((1, 6), 2)},
            "attention_mask must hold 1 at tokens and 0 at padding, got other values",
        ),
        ({"input_ids": tokens(1, 6), "is_causal": False}, "is_causal must be True or left out, got False"),
        ({"input_ids": tokens(1, 6), "output_router_logits": True}, "output_router_logits must be False or left out"),
        ({"input_ids": tokens(1, 6), "attention_masks": 1}, "forward takes no argument named attention_masks, got 1"),
        ({"input_ids": tokens(1, 6), "past_key_values": object()}, "past_key_values must be a LogLinearCache"),
        ({"input_ids": tokens(1, 6), "cu_seqlens": torch.tensor([0, 6]), "use_cache": True}, "cannot continue packed"),
    ],
)
def test_contradictory_inputs_raise(make_model, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model()(**arguments)


@KINDS
def test_arguments_that_transformers_hands_over_and_that_agree_are_taken(make_model, options) -> None:
    model, ids = make_model(**options), tokens(1, 6)
    boundaries = torch.tensor([0, 2, 6], dtype=torch.int32)
    packed = dict(cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries, max_length_q=4, max_length_k=4)
    expected = model(ids, cu_seqlens=boundaries).logits
    positions = torch.tensor([[0, 1, 0, 1, 2, 3]])
    neutral = dict(is_causal=True, output_router_logits=False, output_attentions=False, token_type_ids=None)
    assert torch.equal(model(ids, position_ids=positions, **packed, **neutral).logits, expected)


@KINDS
def test_masks_of_every_type_are_the_same_mask(make_model, options) -> None:
    model, ids = make_model(**options), tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]])
    expected = model(ids, attention_mask=mask).logits
    for dtype in (torch.bool, torch.int32, torch.float32, torch.bfloat16):
        assert torch.equal(model(ids, attention_mask=mask.to(dtype)).logits, expected)


def test_position_ids_of_padded_rows_are_no_restart(make_model) -> None:
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    positions = (mask.cumsum(1) - 1).clamp(min=0).masked_fill(mask == 0, 0)
    model, ids = make_model(**HYBRID), tokens(2, 6)
    given = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(given[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "mamba"}, "unknown variant 'mamba': did you mean 'mamba2'"),
        ({"num_levels": 0}, "num_levels must be an integer of at least 1, got 0"),
        ({"chunk_size": 12}, "chunk_size must be a power of two, got 12"),
        ({"num_heads": 4, "num_groups": 3}, "num_heads must be a multiple of num_groups = 3, got 4"),
        ({"lambda_form": "exp"}, "lambda_form must be one of"),
        ({"mixer_norm_eps": 0.0}, "mixer_norm_eps must be positive and finite, got 0.0"),
        ({"initializer_range": -1.0}, "initializer_range must be finite and at least 0, got -1.0"),
        ({"initializer_range": float("nan")}, "initializer_range must be finite, got nan"),
        ({"intermediate_size": -5}, "intermediate_size must be an integer of at least 0, got -5"),
        ({"negative_eigenvalues": True}, "negative_eigenvalues needs a variant with the delta rule, got 'mamba2'"),
        ({"layer_types": ["linear_attention"]}, "layer_types must have num_hidden_layers = 2 entries, got 1"),
        ({"layer_types": ["linear_attention", "mamba"]}, "layer_types must hold .* got 'mamba'"),
    ],
)
def test_impossible_configurations_raise(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)


def test_defaults_make_a_model() -> None:
    config = LogLinearConfig()
    assert (config.num_groups, config.intermediate_size) == (1, 704)
    assert LogLinearConfig(variant="gated_delta_net").num_groups == config.num_heads
    with torch.device("meta"):
        assert LogLinearForCausalLM(config).num_parameters() > 1e6

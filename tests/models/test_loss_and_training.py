import pytest
import torch
from tiny_models import HYBRID, KINDS, tokens
from torch.nn import functional as F

from loglinear.models import LogLinearForCausalLM
from loglinear.models.places import TokenPlaces
from loglinear.variants import VARIANTS
from tests.checkpointing import recompute_blocks

T = 29


def plain_loss(model: LogLinearForCausalLM, ids: torch.Tensor, labels: torch.Tensor, **inputs) -> torch.Tensor:
    logits = model(ids, use_cache=False, **inputs).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def gradients(model: LogLinearForCausalLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@KINDS
@pytest.mark.parametrize("tied", [False, True])
def test_sliced_loss_is_plain_cross_entropy_with_every_gradient(make_model, options: dict, tied: bool) -> None:
    model, ids = make_model(tie_word_embeddings=tied, **options).train(), tokens(2, T)
    labels = ids.clone()
    labels[0, 5:9] = -100
    sliced = model(ids, labels=labels)
    plain = plain_loss(model, ids, labels)
    torch.testing.assert_close(sliced.loss, plain)
    expected, actual = gradients(model, plain), gradients(model, sliced.loss)
    assert actual.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_loss_sees_float32_logits_of_one_slice_at_most(make_model, monkeypatch) -> None:
    model, ids = make_model(torch.float32).train(), tokens(2, T)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[0]))
    model(ids, labels=ids).loss.backward()
    assert max(seen) == model.config.loss_chunk_size and sum(seen) == 2 * (2 * T)  # forward and recomputation


def test_training_returns_no_logits_beside_a_loss_unless_they_are_asked_for(make_model) -> None:
    model, ids = make_model().train(), tokens(2, T)
    output = model(ids, labels=ids)
    assert output.logits is None and output.past_key_values is None
    logits = model(ids).logits
    for asked in ({"logits_to_keep": 0}, {"skip_logits": False}):
        torch.testing.assert_close(model(ids, labels=ids, **asked).logits, logits)
    loss, second = model(ids, labels=ids, return_dict=False)
    torch.testing.assert_close((loss, second), (output.loss, logits))


def test_evaluation_returns_logits_beside_a_loss_unless_they_are_left_out(make_model) -> None:
    model, ids = make_model(), tokens(2, T)
    output = model(ids, labels=ids)
    torch.testing.assert_close(output.logits, model(ids).logits)
    alone = model(ids, labels=ids, skip_logits=True)
    assert list(alone) == ["loss"] and torch.equal(alone.loss, output.loss)
    model.config.return_dict = False
    loss, logits = model(ids, labels=ids)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)


@pytest.mark.parametrize("arguments", [{}, {"labels": tokens(2, T), "logits_to_keep": 1}], ids=["no loss", "both"])
def test_leaving_out_logits_that_are_needed_is_refused(make_model, arguments: dict) -> None:
    with pytest.raises(ValueError, match="skip_logits=True needs labels and excludes logits_to_keep"):
        make_model()(tokens(2, T), skip_logits=True, **arguments)


def test_num_items_in_batch_divides_the_sum(make_model) -> None:
    model, ids = make_model(), tokens(2, T)
    mean = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=torch.tensor(7)).loss, mean * 2 * (T - 1) / 7)


def test_no_target_at_all_gives_zero_loss_and_gradients(make_model) -> None:
    model, ids = make_model(), tokens(1, 5)
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss == 0 and not any(p.grad.abs().sum() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "mask", [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0, 0], [0] * 7]
)
def test_padding_anywhere_leaves_the_targets_of_the_row_alone(mask: list[int]) -> None:
    real, labels = torch.tensor([mask]).bool(), torch.arange(10, 17)[None]
    targets = TokenPlaces.of(labels, attention_mask=real).targets(labels)
    alone = labels[real][None]
    if real.any():
        alone = TokenPlaces.of(alone).targets(alone)
    assert torch.equal(targets[real][None], alone)
    assert (targets[~real] == -100).all()


@pytest.mark.parametrize("options", [{}, HYBRID], ids=["mamba2", "hybrid"])
def test_right_padded_loss_is_the_loss_without_padding(make_model, options: dict) -> None:
    model, ids = make_model(**options), tokens(2, T)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    padded = model(ids, attention_mask=mask, labels=ids).loss
    alone = [model(ids[:1], labels=ids[:1]).loss * (T - 1), model(ids[1:, :20], labels=ids[1:, :20]).loss * 19]
    torch.testing.assert_close(padded, sum(alone) / (T - 1 + 19))


def test_generating_while_gradient_checkpointing_trains_is_refused(make_model) -> None:
    model = make_model()
    recompute_blocks(model)
    model.train()
    with pytest.raises(ValueError, match="call model.eval"):
        model.generate(tokens(1, 5), max_new_tokens=2, do_sample=False)
    assert model.eval().generate(tokens(1, 5), max_new_tokens=2, do_sample=False).shape == (1, 7)


def test_first_token_of_a_document_is_no_target() -> None:
    labels = torch.arange(8)[None]
    for ends, expected in (
        ([0, 3, 3, 7, 8], [[1, 2, -100, 4, 5, 6, -100, -100]]),
        ([0, 0, 8], [[1, 2, 3, 4, 5, 6, 7, -100]]),
    ):
        assert TokenPlaces.of(labels, cu_seqlens=torch.tensor(ends)).targets(labels).tolist() == expected


def test_packed_loss_is_the_mean_over_all_documents_targets(make_model) -> None:
    model, ids = make_model(), tokens(1, T)
    cuts = [0, 1, 10, T]
    packed = model(ids, labels=ids, cu_seqlens=torch.tensor(cuts)).loss
    parts = [ids[:, a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    total = sum(model(part, labels=part).loss * (part.shape[1] - 1) for part in parts)
    torch.testing.assert_close(packed, total / (T - 3))


def test_padded_loss_is_the_loss_without_padding(make_model) -> None:
    model, ids = make_model(), tokens(1, T)
    mask = torch.ones_like(ids)
    mask[:, :6] = 0
    padded = model(ids, attention_mask=mask, labels=ids).loss
    torch.testing.assert_close(padded, model(ids[:, 6:], labels=ids[:, 6:]).loss)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{"variant": "mamba2"}, HYBRID], ids=["mamba2", "hybrid"])
def test_gradient_checkpointing_changes_no_gradient(make_model, options: dict, reentrant: bool) -> None:
    model, ids = make_model(**options).train(), tokens(1, T)
    packed = {"cu_seqlens": torch.tensor([0, 9, T])}
    expected = gradients(model, model(ids, labels=ids, **packed).loss)
    recompute_blocks(model, use_reentrant=reentrant)
    model.enable_input_require_grads()
    calls = []
    model.model.layers[0].mixer.register_forward_hook(lambda *_: calls.append(1))
    actual = gradients(model, model(ids, labels=ids, **packed).loss)
    assert len(calls) == 2
    assert model(ids, use_cache=True).past_key_values is None  # a recomputation must not write to it a second time
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["softplus", "bounded", "unit"])
def test_every_variant_learns_and_generates(make_model, variant: str, form: str) -> None:
    model, ids = make_model(torch.float32, variant=variant, lambda_form=form).train(), tokens(2, T)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    generated = model.eval().generate(ids, max_new_tokens=3, eos_token_id=None)
    assert generated.shape == (2, T + 3)


def test_autocast_trains_near_float32(make_model) -> None:
    model, ids = make_model(torch.float32).train(), tokens(2, T)
    expected = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model(ids, labels=ids).loss
    actual.backward()
    assert actual.dtype == torch.float32
    assert abs(actual - expected) < 0.02 * expected


@KINDS
@pytest.mark.parametrize("naming", ["cu_seqlens", "cu_seq_lens_q", "seq_idx"])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_a_mask_of_ones_beside_packed_documents_changes_no_target(make_model, options, naming: str, dtype) -> None:
    model, ids = make_model(**options), tokens(1, T)
    boundaries = torch.tensor([0, 1, 10, 10, T])
    if naming == "seq_idx":
        boundaries = torch.arange(4).repeat_interleave(boundaries.diff())[None]
    mask = torch.ones_like(ids, dtype=dtype)
    packed = model(ids, attention_mask=mask, labels=ids, **{naming: boundaries}).loss
    parts = [ids[:, a:b] for a, b in ((0, 1), (1, 10), (10, T))]
    total = sum(model(part, labels=part).loss * (part.shape[1] - 1) for part in parts)
    torch.testing.assert_close(packed, total / (T - 3))


def test_shift_labels_are_the_targets_themselves(make_model) -> None:
    """As context parallelism hands them over: shifted before rows are cut into shards."""
    model, ids = make_model(), tokens(2, T)
    shifted, others = tokens(2, T, seed=3), tokens(2, T, seed=4)
    shifted[0, 5:9] = -100
    expected = F.cross_entropy(model(ids).logits.flatten(0, 1), shifted.flatten(), ignore_index=-100)
    for labels in (None, ids, others):
        torch.testing.assert_close(model(ids, labels=labels, shift_labels=shifted).loss, expected)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    alone = shifted.clone()
    alone[1, 20:] = -100
    padded = model(ids, attention_mask=mask, shift_labels=shifted).loss
    torch.testing.assert_close(padded, model(ids, shift_labels=alone).loss)
    torch.testing.assert_close(model(ids, shift_labels=shifted, num_items_in_batch=5).loss, expected * (2 * T - 4) / 5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(1, 28, dtype=torch.long), r"must have shape \[1, 29\], got \[1, 28\]"),
        (torch.zeros(2, T, dtype=torch.long), r"must have shape \[1, 29\], got \[2, 29\]"),
        (torch.zeros(T, dtype=torch.long), r"must have shape \[1, 29\], got \[29\]"),
        (torch.zeros(1, T), "must hold integers, got torch.float32"),
    ],
)
def test_labels_that_do_not_fit_are_one_clear_line(make_model, packed, name, wrong, message) -> None:
    boundaries = {"cu_seqlens": torch.tensor([0, 9, T])} if packed else {}
    with pytest.raises(ValueError, match=f"^{name} {message}$"):
        make_model()(tokens(1, T), **{name: wrong}, **boundaries)

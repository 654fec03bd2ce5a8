"""Sequences that start at any position of the tree: the partition is that of their positions, all else stays."""

import copy

import pytest
import torch
from black_box import replace_kernels
from tiny_models import HYBRID, KINDS, ROUTED, ROUTED_DELTA, TRANSFORMER, tiny_config, tokens

from loglinear.models import LogLinearCache, LogLinearForCausalLM
from loglinear.ops import impl_triton
from loglinear.training.compilation import compile_blocks
from tests.checkpointing import recompute_blocks
from tests.ops.operators import excess

T = 21
STARTS = torch.tensor([3, 13])  # in chunks of 4, and with 5 levels


def behind_silent_tokens(operator):
    """The operator, from position 0, behind as many tokens that write nothing as each row's position says."""

    def run(*tensors, initial_state, output_final_state, cu_seqlens, **options):
        rows = []
        for b, p in enumerate(initial_state.position.tolist()):
            fronts = [x[b : b + 1, :1].expand(-1, p, *[-1] * (x.dim() - 2)).detach() for x in tensors]
            fronts[2], fronts[3] = torch.zeros_like(fronts[2]), torch.zeros_like(fronts[3])  # v, log_decay
            longer = (torch.cat([front, x[b : b + 1]], 1) for front, x in zip(fronts, tensors, strict=True))
            rows.append(operator(*longer, **options).output[:, p:])
        return torch.cat(rows), None

    return run


def gradients(model, **inputs):
    model.zero_grad()
    logits = model(**inputs).logits
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("options", [{"variant": "mamba2"}, {"variant": "gated_delta_net"}, HYBRID], ids=str)
def test_a_model_at_a_position_with_every_gradient(make_model, options) -> None:
    model, ids = make_model(**options), tokens(2, T)
    actual = gradients(model, input_ids=ids, initial_position=STARTS, use_cache=False)
    for block in model.model.layers:
        if hasattr(block.mixer, "operator"):
            block.mixer.operator = behind_silent_tokens(block.mixer.operator)
    expected = gradients(model, input_ids=ids, initial_position=STARTS, use_cache=False)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@KINDS
def test_position_matters_where_there_is_a_tree(make_model, options) -> None:
    model, ids = make_model(**options), tokens(2, T)
    plain = model(ids).logits
    torch.testing.assert_close(model(ids, initial_position=torch.tensor([0, 0])).logits, plain, rtol=1e-11, atol=1e-11)
    moved = model(ids, initial_position=STARTS).logits
    has_tree = model.config.num_levels > 1 and options != TRANSFORMER
    assert torch.allclose(moved, plain, rtol=1e-11, atol=1e-11) != has_tree


@pytest.mark.parametrize("options", [{"variant": "mamba2"}, HYBRID, ROUTED, ROUTED_DELTA], ids=str)
def test_rows_pieces_padding_and_packing_keep_their_positions(make_model, options) -> None:
    model, ids = make_model(**options), tokens(2, T)
    whole = model(ids, initial_position=STARTS).logits
    for row in range(2):
        alone = model(ids[row : row + 1], initial_position=STARTS[row : row + 1]).logits
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        first = model(ids[:, :7], initial_position=STARTS, use_cache=True)
        outputs, cache = [first.logits], first.past_key_values
        for part in ids[:, 7:].split([1, 1, 12], dim=1):
            outputs.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-11, atol=1e-11)
    padded, mask = torch.nn.functional.pad(ids, (3, 0)), torch.ones(2, T + 3)
    mask[:, :3] = 0
    shown = model(padded, attention_mask=mask, initial_position=STARTS).logits[:, 3:]
    torch.testing.assert_close(shown, whole, rtol=1e-11, atol=1e-11)
    packed = model(ids.view(1, -1), cu_seqlens=torch.tensor([0, T, 2 * T]), initial_position=STARTS).logits
    torch.testing.assert_close(packed.view_as(whole), whole, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [ROUTED, ROUTED_DELTA], ids=["mamba2", "delta"])
def test_a_routed_model_at_the_edge_of_every_block_is_one_at_0(make_model, options) -> None:
    """The partition of the tokens is the same."""
    model, ids = make_model(**options), tokens(2, T)
    plain = gradients(model, input_ids=ids, use_cache=False)
    moved = gradients(model, input_ids=ids, initial_position=torch.tensor([64, 5 * 64]), use_cache=False)
    torch.testing.assert_close(moved, plain, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("max_cache_len", [None, 40])
@torch.no_grad()
def test_rows_of_a_routed_cache_keep_their_starts(make_model, max_cache_len) -> None:
    """In another order, repeated, and after other sequences in the same memory."""
    model, ids = make_model(**ROUTED), tokens(2, T)
    whole = model(ids, initial_position=STARTS).logits
    cache = LogLinearCache(model.config, max_cache_len)
    model(ids, initial_position=STARTS.flip(0) + 1, past_key_values=cache)
    cache.reset()
    model(ids[:, :9], initial_position=STARTS, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    logits = [model(ids.flip(0)[:, t : t + 1], past_key_values=cache).logits for t in range(9, T - 1)]
    torch.testing.assert_close(torch.cat(logits, 1), whole.flip(0)[:, 9:-1], rtol=1e-10, atol=1e-10)
    if max_cache_len is None:
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        last = model(ids[:, -1:], past_key_values=cache).logits
        torch.testing.assert_close(last, whole[:, -1:], rtol=1e-10, atol=1e-10)


def test_gradient_checkpointing_recomputes_at_the_position(make_model) -> None:
    model, ids = make_model().train(), tokens(2, T)
    expected = gradients(model, input_ids=ids, initial_position=STARTS)
    recompute_blocks(model)
    torch.testing.assert_close(gradients(model, input_ids=ids, initial_position=STARTS), expected)


def test_positions_that_do_not_fit_are_named(make_model) -> None:
    model, ids = make_model(), tokens(2, T)
    for position, text in (
        (torch.tensor([1]), r"initial_position must have shape \[S\] = \[2\], got \[1\]"),
        (torch.tensor([0.0, 1.0]), "initial_position must hold int32 or int64, got torch.float32"),
        (torch.tensor([0, -1]), r"initial_position must be from 0 to 2\*\*62 - 1, got -1"),
        ([1, 2], "initial_position must be a tensor, got list"),
    ):
        with pytest.raises(ValueError, match=text):
            model(ids, initial_position=position)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="initial_position needs new sequences, got past_key_values"):
        model(ids, past_key_values=cache, initial_position=STARTS)


@pytest.mark.parametrize("max_cache_len", [None, 40])
@pytest.mark.parametrize(
    "options",
    [{"variant": "mamba2"}, {"variant": "gated_delta_net"}, {"num_levels": 1}, HYBRID, TRANSFORMER, ROUTED],
    ids=str,
)
def test_a_reset_cache_takes_the_positions_of_new_sequences(make_model, options, max_cache_len) -> None:
    """Also those of single tokens, and for a pass that carries gradients."""
    model, ids = make_model(**options), tokens(2, T)
    cache = LogLinearCache(model.config, max_cache_len)

    def outputs(starts, *lengths):
        pieces = ids.split([*lengths, T - sum(lengths)], 1)
        first = model(pieces[0], past_key_values=cache, initial_position=starts).logits.detach()
        return torch.cat([first, *(model(x, past_key_values=cache).logits.detach() for x in pieces[1:])], 1)

    with torch.no_grad():
        expected = outputs(STARTS, 7, 1)
    with pytest.raises(ValueError, match="initial_position needs new sequences, got past_key_values"):
        model(ids[:, :1], past_key_values=cache, initial_position=STARTS)
    for lengths in ((7, 1), (1, 1), (T - 1,)):
        for enabled in (False, True):
            cache.reset()
            with torch.set_grad_enabled(enabled):
                torch.testing.assert_close(outputs(STARTS, *lengths), expected, rtol=1e-10, atol=1e-10)
    cache.reset()
    plain = model(ids, use_cache=False).logits.detach()
    torch.testing.assert_close(outputs(None, 7, 1), plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "arguments", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 3}], ids=str
)
def test_generate_refuses_positions_in_one_line(make_model, arguments) -> None:
    text = "^generate takes no initial_position: .* forward.* past_key_values"
    with pytest.raises(ValueError, match=text) as caught:
        make_model().generate(tokens(2, 5), initial_position=STARTS, max_new_tokens=2, **arguments)
    assert "\n" not in str(caught.value)
    assert make_model().generate(tokens(2, 5), initial_position=None, max_new_tokens=2, **arguments).shape == (2, 7)


@pytest.mark.parametrize("options", [{}, ROUTED, ROUTED_DELTA], ids=["mamba2", "routed", "routed delta"])
def test_generate_continues_sequences_at_positions(make_model, options) -> None:
    """The refusal names this way."""
    model, ids = make_model(**options), tokens(2, T)
    with torch.no_grad():
        cache = model(ids[:, :-1], initial_position=STARTS, use_cache=True).past_key_values
        options = dict(max_new_tokens=4, eos_token_id=None, do_sample=False)
        written = model.generate(ids, past_key_values=cache, **options)
        for end in range(T, T + 4):
            expected = model(written[:, :end], initial_position=STARTS).logits[:, -1].argmax(-1)
            assert torch.equal(written[:, end], expected)


@pytest.mark.interpreter
@pytest.mark.parametrize("variant", ["mamba2", "gated_delta_net"])
def test_a_block_with_positions_is_one_graph(monkeypatch, variant) -> None:
    """Also for another number of rows; with the kernels' place in it, and no value read by Python."""
    replace_kernels(monkeypatch)
    monkeypatch.setattr(impl_triton, "unsupported", lambda problem: None)
    torch._dynamo.reset()
    options = dict(num_hidden_layers=1, num_heads=2, chunk_size=16, impl="triton", variant=variant)
    models = [LogLinearForCausalLM(tiny_config(**options)).train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    exact = copy.deepcopy(models[0]).double()
    compile_blocks(models[1], backend="aot_eager", fullgraph=True)
    for rows in (2, 3, 5):
        ids, starts = tokens(rows, T), 5 * torch.arange(rows)
        results = [gradients(m, input_ids=ids, initial_position=starts) for m in (exact, *models)]
        for e, plain, compiled in zip(*results, strict=True):
            assert excess(compiled, plain, e, size=1.0) <= 6

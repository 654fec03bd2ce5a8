"""Cached generation against the full forward, which knows no cache."""

import pytest
import torch
from tiny_models import HYBRID, KINDS, TRANSFORMER, tokens
from transformers import TextStreamer

from loglinear.models import LogLinearCache, LogLinearForCausalLM
from loglinear.models.cache import LinearStateLayer
from loglinear.training import ByteTokenizer
from tests.ops.operators import excess

T = 21
NEW = 9
LINEAR_KINDS = [{"variant": "mamba2"}, {"variant": "gated_delta_net"}]


def greedy_by_full_forward(model: LogLinearForCausalLM, prompt: torch.Tensor, new: int = NEW) -> torch.Tensor:
    """One row, no cache, no padding."""
    ids = prompt[None]
    for _ in range(new):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, prompt.shape[0] :]


def left_padded(lengths: list[int], width: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tokens(len(lengths), width), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    return ids * mask, mask


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("max_cache_len", [None, 60])
@pytest.mark.parametrize("grad", [False, True], ids=["steps", "pieces"])
def test_prefill_and_decode_equal_the_full_forward_at_every_step(
    make_model, options, dtype, max_cache_len, grad
) -> None:
    model, ids = make_model(dtype, **options), tokens(2, 50)
    expected = model(ids, use_cache=False).logits
    exact = make_model(torch.float64, **options)(ids, use_cache=False).logits
    cache, pieces = LogLinearCache(model.config, max_cache_len), []
    for piece in [*ids[:, :7].split([7], 1), *ids[:, 7:16].split([3, 6], 1), *ids[:, 16:].split(1, 1)]:
        with torch.set_grad_enabled(grad):
            pieces.append(model(piece, past_key_values=cache).logits)
    assert cache.get_seq_length() == 50
    if dtype == torch.float64:
        assert (torch.cat(pieces, 1) - expected).abs().max() < 1e-9
    else:  # As near to float64 as the full forward is, over all tokens: one token's error may happen to be tiny.
        assert excess(torch.cat(pieces, 1), expected, exact) < 8


@KINDS
@pytest.mark.parametrize("chunk", [None, 1, 4, 6])
def test_left_padded_batch_generates_exactly_the_unpadded_answers(make_model, options, chunk: int | None) -> None:
    model = make_model(**options)
    lengths = [T, 12, 1]  # with pieces of 4, two of the rows start with pieces that are all padding
    ids, mask = left_padded(lengths)
    generated = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=None, prefill_chunk_size=chunk
    )
    for row, length in enumerate(lengths):
        expected = greedy_by_full_forward(model, ids[row, T - length :])
        assert generated[row, T:].tolist() == expected.tolist()


@KINDS
def test_every_row_may_be_padding_in_a_piece(make_model, options) -> None:
    model = make_model(**options)
    ids, mask = left_padded([12, 9])
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=None, prefill_chunk_size=4)
    for row, length in enumerate([12, 9]):
        assert generated[row, T:].tolist() == greedy_by_full_forward(model, ids[row, T - length :]).tolist()


@KINDS
def test_a_padded_cache_continues_without_a_mask(make_model, options) -> None:
    model = make_model(**options)
    ids, mask = left_padded([T, 5])
    cache = LogLinearCache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    more = tokens(2, 6, seed=3)
    logits = torch.cat([model(piece, past_key_values=cache).logits for piece in more.split([1, 4, 1], 1)], 1)
    alone = model(torch.cat([ids[1:, T - 5 :], more[1:]], 1)).logits[:, 5:]
    torch.testing.assert_close(logits[1:], alone, rtol=1e-10, atol=1e-10)


@KINDS
@pytest.mark.parametrize("padded", [False, True])
def test_beam_search_with_the_cache_is_beam_search_without(make_model, options, padded: bool) -> None:
    model = make_model(**options)
    ids, mask = left_padded([T, 8] if padded else [T, T])
    search = dict(attention_mask=mask, max_new_tokens=NEW, num_beams=3, num_return_sequences=2, eos_token_id=None)
    cached = model.generate(ids, **search)
    assert cached.tolist() == model.generate(ids, use_cache=False, **search).tolist()
    assert len(set(map(tuple, cached.tolist()))) == 4


@KINDS
def test_sampling_with_a_seed_repeats_and_needs_no_cache(make_model, options) -> None:
    model, ids = make_model(**options), tokens(2, T)

    def sample(seed: int, **more) -> list:
        torch.manual_seed(seed)
        return model.generate(ids, do_sample=True, top_k=20, max_new_tokens=NEW, eos_token_id=None, **more).tolist()

    assert sample(0) == sample(0) == sample(0, use_cache=False)
    assert sample(0) != sample(1)


def test_generate_continues_a_conversation_from_its_cache(make_model) -> None:
    model, ids = make_model(**HYBRID), tokens(1, T)
    cache = LogLinearCache(model.config)
    first = model.generate(ids, past_key_values=cache, max_new_tokens=4, eos_token_id=None)
    prompt = torch.cat([first, tokens(1, 5, seed=9)], 1)
    second = model.generate(prompt, past_key_values=cache, max_new_tokens=4, eos_token_id=None)
    assert second[0, prompt.shape[1] :].tolist() == greedy_by_full_forward(model, prompt[0], 4).tolist()


def test_a_finished_row_does_not_disturb_the_others(make_model) -> None:
    model, ids = make_model(), tokens(2, T)
    free = [greedy_by_full_forward(model, row).tolist() for row in ids]
    stop = next(token for token in free[0] if token not in free[1])
    generated = model.generate(ids, max_new_tokens=NEW, eos_token_id=stop, pad_token_id=0)[:, T:].tolist()
    end = free[0].index(stop) + 1
    assert generated[0] == free[0][:end] + [0] * (NEW - end)
    assert generated[1] == free[1]


@KINDS
@pytest.mark.parametrize("search", [dict(), dict(num_beams=3), dict(prefill_chunk_size=4)], ids=str)
def test_a_static_cache_generates_the_same(make_model, options, search) -> None:
    model = make_model(**options)
    ids, mask = left_padded([T, 12, 1])
    options = dict(attention_mask=mask, max_new_tokens=NEW, eos_token_id=None, **search)
    static = model.generate(ids, cache_implementation="static", **options)
    assert static.tolist() == model.generate(ids, **options).tolist()


def test_what_a_cache_cannot_continue_is_one_clear_line(make_model) -> None:
    model, ids = make_model(), tokens(2, T)
    cache = LogLinearCache(model.config)
    model.generate(ids, past_key_values=cache, max_new_tokens=4, eos_token_id=None)
    for again, seen in ((ids, T + 3), (ids[:, :3], T + 3)):
        with pytest.raises(ValueError, match=f"past_key_values has seen {seen} tokens, got {again.shape[1]}"):
            model.generate(again, past_key_values=cache, max_new_tokens=4)
    with pytest.raises(ValueError, match="past_key_values holds 2 sequences, got a batch of 1"):
        model(ids[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="at least one token"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match="cannot go back"):
        cache.crop(-1)


def kept_by(layer) -> list[torch.Tensor]:
    return layer.state.tensors if isinstance(layer, LinearStateLayer) else [layer.keys, layer.values]


@pytest.mark.parametrize("options", LINEAR_KINDS, ids=str)
@pytest.mark.parametrize("pieces", [(7, 1), (7, 4)], ids=str)
def test_gradients_pass_through_the_pieces_that_continue_a_cache(make_model, options, pieces) -> None:
    """A piece's own gradients are those of the same tokens behind constants."""
    model, ids = make_model(**options), tokens(1, sum(pieces))
    cache = LogLinearCache(model.config)
    with torch.no_grad():
        model(ids[:, : pieces[0]], past_key_values=cache)
    for _ in range(2):
        model(ids[:, pieces[0] :], past_key_values=cache).logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@KINDS
@pytest.mark.parametrize("max_cache_len", [None, 60])
def test_a_cache_made_in_inference_mode_continues_outside_of_it(make_model, options, max_cache_len) -> None:
    model, ids = make_model(**options), tokens(1, T)
    with torch.inference_mode():
        cache = LogLinearCache(model.config, max_cache_len)
        model(ids[:, :8], past_key_values=cache)
        model(ids[:, 8:9], past_key_values=cache)
    generated = model.generate(ids, past_key_values=cache, max_new_tokens=4, eos_token_id=None)
    assert generated[0, T:].tolist() == greedy_by_full_forward(model, ids[0], 4).tolist()


@pytest.mark.parametrize("search", [{}, {"num_beams": 2}, {"streamer": True}], ids=str)
def test_generate_hands_the_forward_only_what_it_takes(make_model, search) -> None:
    model, ids, tokenizer = make_model(), tokens(1, 5), ByteTokenizer()
    if "streamer" in search:
        search = {"streamer": TextStreamer(tokenizer)}
    stopped = model.generate(ids, max_new_tokens=4, stop_strings=["no such text"], tokenizer=tokenizer, **search)
    assert stopped.tolist() == model.generate(ids, max_new_tokens=4, **search).tolist()


@KINDS
def test_rows_of_a_cache_made_in_inference_mode_move_outside_of_it(make_model, options) -> None:
    model, ids = make_model(**options), tokens(2, T)
    for columns in (None, 60):
        with torch.inference_mode():
            cache = LogLinearCache(model.config, columns)
            model(ids, attention_mask=left_padded([T, 8])[1], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        logits = model(ids[1:, :2].expand(2, 2), past_key_values=cache).logits
        assert torch.equal(logits[0], logits[1])


@KINDS
@pytest.mark.parametrize(
    "call, text",
    [
        (lambda cache: cache.reorder_cache(torch.tensor([0, 2])), "beam_idx must be from 0 to 1, .* got 2"),
        (lambda cache: cache.reorder_cache(torch.tensor([0, -1])), "beam_idx must be from 0 to 1, .* got -1"),
        (
            lambda cache: cache.reorder_cache(torch.tensor([0])),
            "beam_idx must have one number for each of 2 rows, got 1",
        ),
        (lambda cache: cache.reorder_cache([0, 1]), "beam_idx must be a tensor, got list"),
        (lambda cache: cache.batch_select_indices(torch.tensor([5])), "indices must be from 0 to 1, .* got 5"),
        (lambda cache: cache.batch_select_indices(torch.tensor([0.0])), "indices must hold int32 or int64, got"),
        (lambda cache: cache.batch_repeat_interleave(0), "repeats must be an integer of at least 1, got 0"),
    ],
    ids=range(7),
)
def test_rows_that_a_cache_does_not_have_are_named(make_model, options, call, text) -> None:
    """Nothing of it has moved then."""
    model, ids = make_model(**options), tokens(2, T)
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match=text):
        call(cache)
    expected = model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1]
    torch.testing.assert_close(model(ids[:, :1], past_key_values=cache).logits[:, 0], expected, rtol=1e-9, atol=1e-9)


@KINDS
def test_a_boolean_mask_is_a_mask(make_model, options) -> None:
    model = make_model(**options)
    ids, mask = left_padded([T, 12])
    generated = model.generate(ids, attention_mask=mask.bool(), max_new_tokens=NEW, eos_token_id=None)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=None)
    assert generated.tolist() == expected.tolist()


@KINDS
def test_a_reset_static_cache_begins_anew_in_its_memory(make_model, options) -> None:
    model, ids = make_model(**options), tokens(2, T)
    cache = LogLinearCache(model.config, 40)
    with torch.no_grad():
        first = [model(piece, past_key_values=cache).logits for piece in ids.split([T - 2, 1, 1], 1)]
        memory = [part.data_ptr() for layer in cache.layers for part in kept_by(layer)]
        cache.reset()
        second = [model(piece, past_key_values=cache).logits for piece in ids.split([T - 2, 1, 1], 1)]
    assert memory == [part.data_ptr() for layer in cache.layers for part in kept_by(layer)]
    assert int(cache.get_seq_length()) == T
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (dict(cache_implementation="quantized"), "cache_implementation must be 'static' or left out, got 'quantized'"),
        (dict(prompt_lookup_num_tokens=2), "assisted generation is not supported with stateful models"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused(make_model, arguments, text) -> None:
    with pytest.raises(ValueError, match=text):
        make_model().generate(tokens(1, 5), max_new_tokens=2, **arguments)


def test_cache_reports_a_size_that_does_not_grow_in_linear_layers(make_model) -> None:
    linear, hybrid = make_model(), make_model(**HYBRID)
    sizes = {kind: [] for kind in ("linear", "hybrid")}
    for length in (5, 50):
        sizes["linear"].append(linear(tokens(2, length)).past_key_values.nbytes)
        sizes["hybrid"].append(hybrid(tokens(2, length)).past_key_values.nbytes)
    assert sizes["linear"][0] == sizes["linear"][1] > 0
    assert sizes["hybrid"][1] - sizes["hybrid"][0] == 2 * 2 * 45 * 8 * 8  # k and v, rows, tokens, width, float64
    cache = linear(tokens(2, 5)).past_key_values
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0


@KINDS
@pytest.mark.parametrize("max_cache_len", [None, 40])
def test_cache_rows_can_be_repeated_and_selected(make_model, options, max_cache_len) -> None:
    model = make_model(**options)
    ids, mask = left_padded([T, 8])
    cache = LogLinearCache(model.config, max_cache_len)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    more = tokens(2, 1, seed=5)
    logits = model(more, past_key_values=cache).logits
    for row, (source, length) in enumerate([(1, 8), (0, T)]):
        alone = model(torch.cat([ids[source : source + 1, T - length :], more[row : row + 1]], 1)).logits[0, -1]
        torch.testing.assert_close(logits[row, -1], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{"variant": "mamba2"}, HYBRID, TRANSFORMER], ids=["mamba2", "hybrid", "softmax"])
@torch.no_grad()
def test_only_full_attention_fills_a_static_cache(make_model, options) -> None:
    model, x = make_model(**options), tokens(2, 12)
    cache = LogLinearCache(model.config, 8)
    for column in range(8):
        model(x[:, column : column + 1], past_key_values=cache)
    if "layer_types" in options:
        with pytest.raises(ValueError, match="past_key_values has room for 8 columns, got 12"):
            model(x[:, 8:], past_key_values=cache)
    else:
        output = model(x[:, 8:], past_key_values=cache, attention_mask=torch.ones(2, 4))
        torch.testing.assert_close(output.logits, model(x).logits[:, 8:])


@torch.no_grad()
def test_a_model_of_linear_layers_keeps_nothing_for_each_column(make_model) -> None:
    mask = torch.ones(2, 12)
    mask[0, :3] = 0
    cache = make_model(variant="mamba2")(tokens(2, 12), attention_mask=mask).past_key_values
    assert cache.real is None

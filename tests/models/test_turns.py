"""Conversations of a batch whose rows end at different lengths: every turn gives what each row gives alone."""

import pytest
import torch
from tiny_models import HYBRID, TRANSFORMER, tokens

from loglinear.models import LogLinearCache, LogLinearForCausalLM

PAD, NEW = 0, 7
KINDS = pytest.mark.parametrize(
    "options",
    [{"variant": "mamba2"}, {"variant": "gated_delta_net"}, HYBRID, TRANSFORMER],
    ids=["mamba2", "gated_delta_net", "hybrid", "transformer"],
)
CACHES = pytest.mark.parametrize("max_cache_len", [None, 80], ids=["dynamic", "static"])


def answer(model: LogLinearForCausalLM, prompt: list[int], stop: int | None = None) -> list[int]:
    """One row alone: no cache, no padding."""
    text = list(prompt)
    while len(text) < len(prompt) + NEW and text[len(prompt) :][-1:] != [stop]:
        text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(prompt) :]


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def a_stop_that_ends_rows_at_different_lengths(answers: list[list[int]]) -> int:
    """An eos token with which one row ends at once, one later or never."""
    for token in range(3, 40):
        ends = [row.index(token) if token in row else NEW for row in answers]
        if len(set(ends)) == len(ends) > 1 and min(ends) < NEW - 2:
            return token
    for token in range(3, 40):
        ends = [row.index(token) if token in row else NEW for row in answers]
        if min(ends) < NEW - 2 and max(ends) > min(ends) + 1:
            return token
    raise AssertionError("no such token: take other prompts")


def first_turn(model, prompts: list[list[int]]) -> tuple[int, list[list[int]]]:
    stop = a_stop_that_ends_rows_at_different_lengths([answer(model, prompt) for prompt in prompts])
    return stop, [answer(model, prompt, stop) for prompt in prompts]


def prompts_of(*lengths: int) -> list[list[int]]:
    return [tokens(1, length, seed=length)[0].tolist() for length in lengths]


@KINDS
@CACHES
@pytest.mark.parametrize("chunk", [None, 3])
def test_every_turn_of_a_batch_is_that_of_each_row_alone(make_model, options, max_cache_len, chunk) -> None:
    model = make_model(**options)
    texts = prompts_of(9, 4, 6)
    stop, _ = first_turn(model, texts)
    cache = LogLinearCache(model.config, max_cache_len)
    call = dict(past_key_values=cache, max_new_tokens=NEW, eos_token_id=stop, pad_token_id=PAD, do_sample=False)
    ids, mask = padded(texts)
    lengths = []
    for turn in range(3):
        expected = [answer(model, text, stop) for text in texts]
        written = model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **call)[:, ids.shape[1] :]
        width = written.shape[1]
        assert written.tolist() == [row + [PAD] * (width - len(row)) for row in expected]
        lengths.append([len(row) for row in expected])
        real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in expected])
        words, word_mask = padded([question[: 5 - turn] for question in prompts_of(5, 3, 1)])
        texts = [
            text + row + word[word_mask[i] == 1].tolist()
            for i, (text, row, word) in enumerate(zip(texts, expected, words, strict=True))
        ]
        ids, mask = torch.cat([ids, written, words], 1), torch.cat([mask, real, word_mask], 1)
    assert any(len(set(row)) > 1 for row in lengths)


@KINDS
def test_an_inferred_mask_continues_rows_that_have_ended(make_model, options) -> None:
    """Without a mask `generate` takes padding by its token."""
    model, texts, questions = make_model(**options), prompts_of(9, 4), tokens(2, 3, seed=8).tolist()
    stop, answers = first_turn(model, texts)
    whole = [text + row + question for text, row, question in zip(texts, answers, questions, strict=True)]
    expected = [answer(model, text, stop) for text in whole]
    pad = next(token for token in range(40) if token not in sum(whole + expected, []))
    call = dict(max_new_tokens=NEW, eos_token_id=stop, pad_token_id=pad, past_key_values=LogLinearCache(model.config))
    ids, mask = padded(texts)
    first = model.generate(ids.masked_fill(mask == 0, pad), **call)
    ids = torch.cat([first, torch.tensor(questions)], 1)
    written = model.generate(ids, **call)[:, ids.shape[1] :].tolist()
    assert written == [row + [pad] * (len(written[0]) - len(row)) for row in expected]


@KINDS
@CACHES
def test_a_mask_or_a_text_that_contradicts_the_cache_is_refused(make_model, options, max_cache_len) -> None:
    model, texts = make_model(**options), prompts_of(9, 4)
    stop, answers = first_turn(model, texts)
    cache = LogLinearCache(model.config, max_cache_len)
    call = dict(past_key_values=cache, max_new_tokens=NEW, eos_token_id=stop, pad_token_id=PAD)
    ids, mask = padded(texts)
    first = model.generate(ids, attention_mask=mask, **call)
    width = first.shape[1] - ids.shape[1]
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in answers])
    ids, mask = torch.cat([first, tokens(2, 3)], 1), torch.cat([mask, real, torch.ones_like(tokens(2, 3))], 1)
    padding, a_token = mask.clone(), mask.clone()
    padding[1, 0], a_token[0, 1] = 1, 0
    ended = torch.cat([mask[:, :9], torch.ones_like(mask[:, 9:])], 1)
    assert not torch.equal(ended, mask)
    for wrong in (padding, a_token, ended, torch.ones_like(mask)):
        with pytest.raises(ValueError, match="^attention_mask contradicts past_key_values"):
            model.generate(ids, attention_mask=wrong, **call)
        with pytest.raises(ValueError, match="^attention_mask contradicts past_key_values"):
            model(ids[:, int(cache.get_seq_length()) :], attention_mask=wrong, past_key_values=cache)
    other = ids.clone()
    other[1, 6] = 39 - other[1, 6]
    with pytest.raises(ValueError, match="^input_ids must begin with the tokens that past_key_values has seen, row 1"):
        model.generate(other, attention_mask=mask, **call)
    with pytest.raises(ValueError, match=r"attention_mask must have \d+ or \d+ columns, got 5"):
        model.generate(ids, attention_mask=mask[:, :5], **call)
    with pytest.raises(ValueError, match="past_key_values holds 2 sequences, got a batch of 1"):
        model.generate(ids[:1], attention_mask=mask[:1], **call)
    other = ids.clone()
    other[1, 0] = 33  # padding: no token
    assert model.generate(other, attention_mask=mask, **call).shape[0] == 2


@KINDS
def test_new_tokens_alone_continue_beside_a_mask_of_the_whole(make_model, options) -> None:
    model, text = make_model(**options), tokens(1, 9)
    cache = LogLinearCache(model.config)
    model(text[:, :6], past_key_values=cache)
    call = dict(max_new_tokens=4, eos_token_id=None)
    mask = torch.ones(1, 9, dtype=torch.long)
    written = model.generate(text[:, 6:], attention_mask=mask, past_key_values=cache, **call)
    assert written[0, 3:].tolist() == answer(model, text[0].tolist())[:4]


@KINDS
def test_a_cache_of_searched_beams_does_not_continue_another_text(make_model, options) -> None:
    """Its rows are the running beams, which need not be the texts that are returned."""
    model = make_model(**options)
    cache = LogLinearCache(model.config)
    search = dict(num_beams=2, num_return_sequences=2, max_new_tokens=6, eos_token_id=None, past_key_values=cache)
    best = model.generate(tokens(1, 5), **search)
    text = torch.cat([best.flip(0), tokens(2, 3)], 1)  # the two texts in the other order
    with pytest.raises(ValueError, match="^input_ids must begin with the tokens that past_key_values has seen, row 0"):
        model.generate(text, past_key_values=cache, max_new_tokens=2)


def test_a_prompt_that_was_seen_whole_is_refused_in_pieces_too(make_model) -> None:
    model, ids = make_model(), tokens(1, 9)
    cache = LogLinearCache(model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values has seen 9 tokens, got 9"):
        model.generate(ids, past_key_values=cache, prefill_chunk_size=4, max_new_tokens=2)


def test_taking_columns_from_a_cache_changes_all_layers_or_none(make_model) -> None:
    options = {**HYBRID, "layer_types": HYBRID["layer_types"][::-1]}
    model, ids = make_model(**options), tokens(2, 9)
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="cannot go back"):
        cache.crop(-2)
    cache.crop(0)
    expected = model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(model(ids[:, :1], past_key_values=cache).logits, expected)


def test_attention_alone_goes_back_with_its_padding(make_model) -> None:
    model, ids = make_model(**TRANSFORMER), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    expected = model(ids, attention_mask=mask).logits[:, 6:]
    cache = model(ids, attention_mask=mask).past_key_values
    cache.crop(-3)
    torch.testing.assert_close(model(ids[:, 6:], past_key_values=cache).logits, expected)

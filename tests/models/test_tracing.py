"""Whole models as one graph: a step of decoding, a forward with a mask, generation from a static cache."""

import pytest
import torch
from tiny_models import HYBRID, KINDS, TRANSFORMER, tokens
from transformers import CompileConfig

from loglinear.models import LogLinearCache

T = 12
GRAPH = dict(backend="eager", fullgraph=True)  # a graph break raises
TWO = pytest.mark.parametrize("options", [{"variant": "mamba2"}, HYBRID], ids=["mamba2", "hybrid"])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(3, T, dtype=torch.long)
    mask[0, :3], mask[1, 5], mask[1, 9:], mask[2] = 0, 0, 0, 0
    return tokens(3, T), mask


@KINDS
@torch.no_grad()
def test_a_step_is_one_graph_whatever_rows_have_a_token(make_model, options) -> None:
    model, ids = make_model(**options), tokens(2, T)
    expected, cache = LogLinearCache(model.config, 20), LogLinearCache(model.config, 20)
    compiled = torch.compile(model, **GRAPH)
    for seen in (expected, cache):
        model(ids[:, :6], past_key_values=seen)
    for t in range(6, T):  # chunks of 4 tokens: some steps fill them, in one row or in both
        mask = torch.tensor([[t % 3 != 0], [True]])
        arguments = dict(input_ids=ids[:, t : t + 1], attention_mask=mask)
        wanted = model(past_key_values=expected, **arguments).logits
        torch.testing.assert_close(compiled(past_key_values=cache, **arguments).logits, wanted)
    assert graphs() == 1


@KINDS
def test_graphs_put_the_tokens_of_a_row_first_and_give_what_no_padding_gives(make_model, options, monkeypatch) -> None:
    model, (ids, mask) = make_model(**options), padded()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    arguments = dict(attention_mask=mask, position_ids=positions, use_cache=False, output_hidden_states=True)
    arguments["output_attentions"] = "layer_types" in options

    def results() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        output = model(ids, **arguments)
        rows = [t[mask.bool()] for t in (output.logits, *output.hidden_states)]
        weights = [w.transpose(1, 2)[mask.bool()] for w in output.attentions or ()]
        return [*rows, *weights, *(p.grad.clone() for p in model.parameters())]

    expected = results()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for ours, theirs in zip(results(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "options", [{"variant": "mamba2"}, HYBRID, TRANSFORMER], ids=["mamba2", "hybrid", "transformer"]
)
def test_a_forward_with_a_mask_is_one_graph_and_can_be_exported(make_model, options) -> None:
    model, (ids, mask) = make_model(**options), padded()
    arguments = dict(input_ids=ids, attention_mask=mask, use_cache=False)
    expected = model(**arguments).logits[mask.bool()]
    exported = torch.export.export(model, (), arguments, strict=False).module()
    for traced in (torch.compile(model, **GRAPH), exported):
        torch.testing.assert_close(traced(**arguments).logits[mask.bool()], expected)
        with pytest.raises(RuntimeError, match="attention_mask must hold 1 at tokens and 0 at padding"):
            traced(**{**arguments, "attention_mask": mask * 2})


@TWO
@pytest.mark.parametrize("late", ["attention_mask", "position_ids", "labels", "shift_labels"])
def test_an_argument_that_comes_late_has_the_sizes_of_the_others(make_model, options, late) -> None:
    """The compiler has made the length free by then, but takes that of a new argument for a constant."""
    model = make_model(**options)
    compiled = torch.compile(model, **GRAPH)
    compiled(input_ids=tokens(2, 12), use_cache=False)
    ids = tokens(2, 32)
    values = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(32).expand(2, 32)}
    arguments = {"input_ids": ids, "use_cache": False, late: values.get(late, ids)}
    torch.testing.assert_close(compiled(**arguments).logits, model(**arguments).logits)


@TWO
def test_generation_with_a_static_cache_has_one_graph_for_all_lengths_up_to_the_largest(make_model, options) -> None:
    model = make_model(**options)
    ids, mask = padded()
    ids, mask = ids[:2], mask[:2].flip(1)
    free = model.generate(ids, attention_mask=mask, max_new_tokens=8, eos_token_id=None)[:, T:].tolist()
    stop = next(token for token in free[0][:4] if token not in free[1])
    config = CompileConfig(mode=None, **GRAPH)
    config._compile_all_devices = True
    compiled = dict(cache_implementation="static", compile_config=config)
    options = dict(attention_mask=mask, eos_token_id=stop, pad_token_id=0, do_sample=False)
    static = model.generate(ids, max_new_tokens=8, **options, **compiled)
    assert static.tolist() == model.generate(ids, max_new_tokens=8, **options).tolist()
    assert graphs() == 1
    model.generate(ids[:, 4:], max_new_tokens=3, **{**options, "attention_mask": mask[:, 4:]}, **compiled)
    assert graphs() == 1

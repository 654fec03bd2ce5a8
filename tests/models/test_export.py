"""Exported and traced models give what they give in eager mode, at other lengths and with other masks too."""

import pytest
import torch
from tiny_models import KINDS, tokens
from transformers.exporters.configs import DynamoConfig
from transformers.exporters.exporter_dynamo import DynamoExporter

T = 12


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask=None):
        return self.model(ids, attention_mask=mask, use_cache=False).logits


@KINDS
@torch.no_grad()
def test_an_exported_model_takes_any_length(make_model, options):
    model, ids = Logits(make_model(**options)), tokens(2, T)
    length = torch.export.Dim("T", min=2, max=4096)
    program = torch.export.export(model, (ids,), dynamic_shapes=({1: length},), strict=False).module()
    for other in (ids, tokens(2, 5, seed=2), tokens(2, 3 * T, seed=3)):
        torch.testing.assert_close(program(other), model(other))


@KINDS
@torch.no_grad()
def test_an_exported_model_takes_any_mask(make_model, options):
    model, ids = Logits(make_model(**options)), tokens(3, T)
    mask = torch.ones(3, T, dtype=torch.long)
    mask[0, :3] = mask[1, 9:] = 0
    program = torch.export.export(model, (ids, mask), strict=False).module()
    for other in (mask, mask.flip(0), torch.ones_like(mask)):
        real = other.bool()
        torch.testing.assert_close(program(ids, other)[real], model(ids, other)[real])


@KINDS
@torch.no_grad()
def test_transformers_exporter_gives_the_same_numbers(make_model, options):
    """Its program has the mask as an input and takes any length."""
    model = make_model(**options)

    def inputs(rows, time, padding):
        mask = torch.ones(rows, time, dtype=torch.long)
        mask[0, :padding] = 0
        return {"input_ids": tokens(rows, time, seed=time), "attention_mask": mask, "use_cache": False}

    program = DynamoExporter().export(model, inputs(2, T, 3), DynamoConfig(dynamic=True))
    for other in (inputs(2, T, 3), inputs(2, T, 0), inputs(2, 7, 2)):
        real = other["attention_mask"].bool()
        given = {name: x for name, x in other.items() if name != "use_cache"}  # a constant of the program
        torch.testing.assert_close(program(**given).logits[real], model(**other).logits[real])


@KINDS
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
@torch.no_grad()
def test_a_traced_model_gives_the_same_numbers(make_model, options):
    model, ids = Logits(make_model(**options)), tokens(2, T)
    traced = torch.jit.trace(model, (ids,))
    other = tokens(2, T, seed=2)
    torch.testing.assert_close(traced(other), model(other))


@KINDS
def test_a_forward_and_its_backward_are_one_graph(make_model, options):
    torch._dynamo.reset()  # or its lengths would follow from those of earlier tests
    model, ids = make_model(**options), tokens(2, T)
    results = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        loss = run(ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)

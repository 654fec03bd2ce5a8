"""Tiny foreign checkpoints with random weights, and the comparison of logits with what they should be."""

import json

import torch
from safetensors.torch import save_file

from loglinear.convert import convert
from loglinear.runs import load_model

VOCABULARY, D, T = 50, 24, 37


def random_tensors(shapes, seed=0, dtype=torch.float64):
    """Random tensors of these shapes, in which nothing is at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.4 * torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def write_checkpoint(folder, config, tensors, *, pickle=False):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if pickle:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tokens(seed=1):
    return torch.randint(0, VOCABULARY, (T,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def converted_logits(source, folder, out, **levels):
    """The logits [T, vocabulary] of the converted checkpoint, loaded from its folder, in float64."""
    convert(folder, out, source=source, **levels)
    model = load_model(out)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    return model(tokens()[None]).logits[0]


def assert_same(ours, theirs):
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)

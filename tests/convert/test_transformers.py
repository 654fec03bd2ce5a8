"""Checkpoints of transformers' Mamba2ForCausalLM."""

import contextlib

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from tests.convert.checkpoints import VOCABULARY, D, assert_same, converted_logits, tokens


@contextlib.contextmanager
def wide():
    """Their code computes through float32; here float64 stays float64, so that only true differences are left."""
    to, single = torch.Tensor.to, torch.Tensor.float

    def keep(self, *args, **kwargs):
        narrow = torch.float32 in args or kwargs.get("dtype") is torch.float32
        return self if narrow and self.dtype is torch.float64 else to(self, *args, **kwargs)

    torch.Tensor.to, torch.Tensor.float = keep, lambda self: self if self.dtype is torch.float64 else single(self)
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float = to, single


def mamba2(folder, **own):
    config = Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=D,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=12,
        state_size=5,
        chunk_size=16,
        conv_kernel=3,
        **own,
    )
    model = Mamba2ForCausalLM(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "own",
    [
        dict(n_groups=1, tie_word_embeddings=True),
        dict(n_groups=2, layer_norm_epsilon=1e-3),
        dict(n_groups=4, use_conv_bias=False, hidden_act="swish"),
    ],
    ids=lambda own: f"n_groups={own['n_groups']}",
)
@pytest.mark.parametrize("num_levels", [1, 4, 15])
def test_logits_are_those_of_the_model(tmp_path, own, num_levels):
    with wide(), torch.no_grad():
        theirs = mamba2(tmp_path / "in", **own)(tokens()[None], use_cache=False).logits[0]
    assert_same(converted_logits("transformers", tmp_path / "in", tmp_path / "out", num_levels=num_levels), theirs)

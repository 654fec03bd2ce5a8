"""The Transformer baseline is Llama: the same numbers from transformers' model with the same weights."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from loglinear.models import LogLinearConfig, LogLinearForCausalLM

LENGTHS = (7, 1, 32)  # of the packed documents
OWN_NAMES = {
    "mixer.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mixer.out_proj": ("self_attn.o_proj",),
    "mixer_norm": ("input_layernorm",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


def own_weights(theirs: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    names = {"model.embed_tokens": ("model.embed_tokens",), "model.norm": ("model.norm",), "lm_head": ("lm_head",)}
    for layer in range(layers):
        for own, parts in OWN_NAMES.items():
            names[f"model.layers.{layer}.{own}"] = tuple(f"model.layers.{layer}.{part}" for part in parts)
    return {f"{own}.weight": torch.cat([theirs[f"{part}.weight"] for part in parts]) for own, parts in names.items()}


@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_transformer_is_llama_in_one_row_and_in_packed_documents(key_heads: int) -> None:
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    heads = dict(num_attention_heads=4, num_key_value_heads=key_heads)
    theirs = LlamaForCausalLM(LlamaConfig(**sizes, **heads, rms_norm_eps=1e-5, initializer_range=0.3)).double().eval()
    ours = LogLinearForCausalLM(LogLinearConfig(**sizes, **heads, layer_types=["full_attention"] * 3)).double().eval()
    ours.load_state_dict(own_weights(theirs.state_dict(), 3))
    tokens = torch.randint(50, (1, sum(LENGTHS)))
    documents = tokens.split(LENGTHS, dim=1)
    with torch.no_grad():
        apart = torch.cat([theirs(document).logits for document in documents], dim=1)
        packed = ours(tokens, cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0)).logits
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-5)

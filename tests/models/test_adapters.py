"""Tools that take linear layers for what they are: low-rank adapters and quantisers."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import HYBRID, tokens
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn import functional as F

from loglinear.models import LogLinearForCausalLM

MODELS = pytest.mark.parametrize("options", [{}, {"variant": "delta_net", "lambda_form": "unit"}, HYBRID])


@MODELS
@pytest.mark.parametrize("targets", [["level_scales.proj"], "all-linear"], ids=["lambda", "all"])
def test_lora_learns_is_saved_and_merged(make_model, tmp_path, options: dict, targets) -> None:
    make_model(torch.float32, **options).save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    adapted = get_peft_model(make_model(torch.float32, **options), LoraConfig(target_modules=targets, r=2))
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    linear = [m for name, m in make_model(**options).named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    lambdas = [name for name in names if "level_scales.proj" in name]
    assert lambdas and (len(names) == 2 * len(linear) if targets == "all-linear" else names == lambdas)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    ids, losses = tokens(2, 9), []
    for _ in range(4):
        losses.append(adapted(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 1e-3
    expected = adapted.eval()(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    base = LogLinearForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(loaded(ids).logits, expected)
    torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-5)


class Int8Linear(nn.Module):
    """As quantisers put in place of a linear layer: it has no weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias, self.scale = linear.bias, linear.weight.detach().abs().amax() / 127 + 1e-12
        self.register_buffer("values", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def dequantized(self) -> torch.Tensor:
        return self.values * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dequantized(), self.bias)


@MODELS
def test_linear_layers_are_only_called(make_model, options: dict) -> None:
    model, rounded = (make_model(torch.float32, **options) for _ in range(2))
    for name, linear in [item for item in rounded.named_modules() if isinstance(item[1], nn.Linear)]:
        quantized = Int8Linear(linear)
        model.set_submodule(name, quantized)
        linear.weight.data.copy_(quantized.dequantized())
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    ids = tokens(2, 9)
    for inputs in ({}, {"labels": ids, "logits_to_keep": 0}):
        actual, expected = model(ids, **inputs), rounded(ids, **inputs)
        assert torch.equal(actual.logits, expected.logits) and (not inputs or torch.equal(actual.loss, expected.loss))
    texts = [m.generate(ids, max_new_tokens=6, do_sample=False) for m in (model, rounded)]
    assert torch.equal(*texts)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@MODELS
def test_dynamic_quantisation_of_torch(make_model, options: dict) -> None:
    model = make_model(torch.float32, **options)
    quantized = quantize_dynamic(model, {nn.Linear})
    assert not any(type(module) is nn.Linear for module in quantized.modules())
    expected, actual = (m(tokens(2, 9)).logits for m in (model, quantized))
    assert 0 < (actual - expected).norm() / expected.norm() < 0.15  # 8 bits
    assert quantized.generate(tokens(2, 9), max_new_tokens=3, do_sample=False).shape[1] > 9

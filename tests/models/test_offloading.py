"""accelerate's offloading: parameters are there only while their module's forward runs. The model stays the same."""

from copy import deepcopy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from tiny_models import HYBRID, TRANSFORMER, tokens

from loglinear.layers import Mixer
from loglinear.models import LogLinearForCausalLM
from loglinear.variants import VARIANTS

MODELS = pytest.mark.parametrize(
    "options", [*({"variant": name} for name in VARIANTS), {"lambda_form": "unit"}, HYBRID, TRANSFORMER]
)
MAP = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1.mixer": "disk",  # half a block
    "model.layers.1.mixer_norm": "cpu",
    "model.layers.1.mlp_norm": "cpu",
    "model.layers.1.mlp": "cpu",
    "model.norm": "disk",
    "lm_head": "disk",
}


@MODELS
@pytest.mark.parametrize("place", ["cpu", "disk", "by_map"])
def test_an_offloaded_model_gives_the_same(make_model, tmp_path, options: dict, place: str) -> None:
    model = make_model(torch.float32, **options)
    if place == "by_map":
        model.save_pretrained(tmp_path)
        other = LogLinearForCausalLM.from_pretrained(tmp_path, device_map=MAP, offload_folder=tmp_path / "offload")
    elif place == "disk":
        other = disk_offload(deepcopy(model), tmp_path)
    else:
        other = cpu_offload(deepcopy(model))
    other.eval()
    assert "meta" in {parameter.device.type for parameter in other.parameters()}
    ids = tokens(2, 9)
    padded = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    for inputs in ({}, {"attention_mask": padded}, {"labels": ids, "logits_to_keep": 0}):
        expected, actual = (m(ids, **inputs) for m in (model, other))
        assert torch.equal(actual.logits, expected.logits)
        assert expected.loss is None or torch.equal(actual.loss, expected.loss)
    texts = [m.generate(ids, attention_mask=padded, max_new_tokens=6, do_sample=False) for m in (model, other)]
    assert torch.equal(*texts)


def test_a_step_is_a_forward_of_the_mixer(make_model) -> None:
    """A hook on a mixer's forward, which moves or gathers parameters or looks at them, sees every token."""
    model = make_model(torch.float32)
    seen: list[int] = []
    for mixer in (module for module in model.modules() if isinstance(module, Mixer)):
        mixer.register_forward_pre_hook(lambda mixer, inputs: seen.append(inputs[0].shape[1]))
    model.generate(tokens(1, 9), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert seen == [9, 9, 1, 1, 1, 1, 1, 1]

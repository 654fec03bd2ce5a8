"""Training of upgraded models: gradients, frozen parameters, stock Trainer, gradient checkpointing, PEFT."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import loglinear
from tests.checkpointing import recompute_blocks
from tests.upgrades.tiny import MODELS, original, tokens, trained, upgraded, wide

FAMILIES = pytest.mark.parametrize("family", MODELS)
PROJECTION = {
    "qwen3_next": "in_proj_qkvz", "qwen3_5": "in_proj_qkv", "qwen3_5_moe": "in_proj_qkv", "olmo_hybrid": "q_proj",
    "kimi_linear": "q_proj", "bailing_hybrid": "q_proj", "glm5_next": "q_proj",
    **dict.fromkeys(("mamba2", "bamba", "granitemoehybrid", "falcon_h1", "nemotron_h", "zamba2"), "in_proj"),
}  # fmt: skip


def loss(model, ids):
    return model(ids, labels=ids, use_cache=False).loss


@FAMILIES
@pytest.mark.parametrize("routing", [None, "gram"])
def test_gradients_reach_every_new_parameter_and_no_other(family, routing):
    model = upgraded(original(family), routing=routing)
    with wide():
        loss(model, tokens(2, 30)).backward()
    new = loglinear.new_parameters(model)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {*new}
    assert all(p.grad.abs().max() > 0 for p in new.values())


@FAMILIES
def test_other_gradients_are_the_original_s(family):
    theirs, ids = original(family), tokens(2, 30)
    model = upgraded(theirs, freeze=False)
    with wide():
        loss(model, ids).backward()
        loss(theirs, ids).backward()
    ours = dict(model.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            bound = 1e-9 * max(parameter.grad.abs().max().item(), 1e-3)
            assert torch.allclose(ours[name].grad, parameter.grad, rtol=0, atol=bound), name


@pytest.mark.parametrize("family", ["qwen3_next", "mamba2", "falcon_h1", "zamba2"])
def test_gradient_checkpointing_gives_the_same_gradients(family):
    model, ids = trained(original(family)), tokens(2, 23)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    found = []
    for on in (False, True):
        other = copy.deepcopy(model).train()
        if on:
            recompute_blocks(other)
        with wide():
            other(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        found.append([p.grad for p in loglinear.new_parameters(other).values()])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*found, strict=True))


@FAMILIES
def test_stock_trainer_trains_the_new_parameters_alone(family, tmp_path):
    model = upgraded(original(family, torch.float32))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 30)]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {*loglinear.new_parameters(model)}


def test_a_trainer_s_checkpoint_loads(tmp_path):
    model = upgraded(original("qwen3_5", torch.float32))
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 30)]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_steps=1
    )
    Trainer(model, arguments, train_dataset=rows).train()
    Trainer(upgraded(original("qwen3_5", torch.float32)), arguments, train_dataset=rows).train(True)
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-2")
    for name, parameter in loglinear.new_parameters(model).items():
        assert torch.equal(loaded.get_parameter(name), parameter)


@FAMILIES
def test_lora_trains_beside_the_level_weights(family, tmp_path):
    base = upgraded(original(family, torch.float32))
    ids = tokens(2, 30)
    config = LoraConfig(target_modules=[PROJECTION[family]], modules_to_save=["level_scales"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {*loglinear.new_parameters(model), *(n for n, _ in model.named_parameters() if "lora_" in n)}
    with torch.no_grad():
        for parameter in loglinear.new_parameters(model).values():
            parameter.normal_(std=0.3)
    loss(model, ids).backward()
    assert all(p.grad.abs().max() > 0 for p in loglinear.new_parameters(model).values())
    with pytest.raises(ValueError, match="model has adapters of PEFT: merge them with merge_and_unload"):
        loglinear.save_upgrade(model, tmp_path / "levels.safetensors")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        right = model(ids).logits
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(ids).logits, right)
        assert torch.allclose(model.merge_and_unload()(ids).logits, right, atol=1e-3)

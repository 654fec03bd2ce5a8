"""TRL's SFTTrainer on an upgraded model of transformers: rows, packed rows and rows without padding."""

import pytest
import torch
from datasets import Dataset
from transformers import pipeline
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import create_model_from_path

import loglinear
from loglinear.models import ByteTokenizer
from tests.upgrades.tiny import original, trained, upgraded


@pytest.mark.parametrize("family", ["qwen3_5", "mamba2", "zamba2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packing": True},
        {"packing": True, "packing_strategy": "wrapped"},
        {"padding_free": True, "max_length": None},
        {"gradient_checkpointing": True},
    ],
    ids=lambda options: "_".join(options) or "rows",
)
def test_sft_trains_the_new_parameters_alone(family, options, tmp_path):
    data = Dataset.from_dict({"text": [f"line {i} of a text, {i * i}" * (1 + i % 4) for i in range(40)]})
    model = upgraded(original(family, torch.float32, vocab_size=264))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    arguments = SFTConfig(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        **{"max_length": 64, "gradient_checkpointing": False, **options},
    )
    SFTTrainer(model, arguments, train_dataset=data, processing_class=ByteTokenizer()).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {*loglinear.new_parameters(model)}


@pytest.mark.parametrize("family", ["qwen3_5", "mamba2"])
def test_a_folder_named_by_its_path_is_the_upgraded_model(family, tmp_path):
    """TRL makes a model of the class of transformers that config.json names, which would be the linear model."""
    model = trained(original(family, torch.float32))
    model.save_pretrained(tmp_path / "first")
    again = create_model_from_path(str(tmp_path / "first"))
    again.save_pretrained(tmp_path / "second")
    for loaded in (again, create_model_from_path(str(tmp_path / "second"))):
        new = loglinear.new_parameters(loaded)
        assert all(torch.equal(new[name], p) for name, p in loglinear.new_parameters(model).items())


def test_a_pipeline_takes_a_folder(tmp_path):
    model = trained(original("qwen3_5", torch.float32, vocab_size=264))
    model.save_pretrained(tmp_path)
    ByteTokenizer().save_pretrained(tmp_path)
    writer = pipeline("text-generation", str(tmp_path))
    assert loglinear.new_parameters(writer.model) and writer("a text", max_new_tokens=3)

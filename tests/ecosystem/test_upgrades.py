"""TRL's SFTTrainer on an upgraded model of transformers: rows, packed rows and rows without padding."""

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import loglinear
from loglinear.models import ByteTokenizer
from tests.upgrades.tiny import original, upgraded


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
        tmp_path, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        bf16=False, save_strategy="no", disable_tqdm=True,
        **{"max_length": 64, "gradient_checkpointing": False, **options},
    )  # fmt: skip
    SFTTrainer(model, arguments, train_dataset=data, processing_class=ByteTokenizer()).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {*loglinear.new_parameters(model)}

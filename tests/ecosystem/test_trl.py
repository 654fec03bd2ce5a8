"""TRL's trainers, from the folder of a checkpoint: a step or two each."""

import math
import runpy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from loglinear.models import CHAT_TEMPLATE, LogLinearForCausalLM, LogLinearForSequenceClassification
from tests.ecosystem.tiny import KINDS, save_tiny

TEXTS = ["a first text", "another one é", "and a third, longer than the others", "the last"]
TURNS = [{"role": "user", "content": "is it é?"}, {"role": "assistant", "content": "no"}]
COMMON = {
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "seed": 0,
}


@pytest.fixture(scope="module", params=["mamba2", "hybrid"])
def checkpoint(request, tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("trl") / "checkpoint", **KINDS[request.param]))


@pytest.fixture
def small(tmp_path):
    """The folder of one model, for what does not depend on its layers."""
    return str(save_tiny(tmp_path / "checkpoint"))


def first_loss(trainer) -> float:
    """Trains; the loss of the first step, after having seen that all are finite."""
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    return losses[0]


def sft(model, data, folder, **options) -> SFTTrainer:
    peft = options.pop("peft_config", None)
    settings = SFTConfig(str(folder), **{**COMMON, "model_init_kwargs": {"dtype": "float32"}, **options})
    return SFTTrainer(model, settings, train_dataset=Dataset.from_list(data), peft_config=peft)


def mean_nats(folder, rows) -> float:
    """The loss of rows (tokens, how many of the last count), by the model itself."""
    model, total, count = LogLinearForCausalLM.from_pretrained(folder), 0.0, 0
    for tokens, counted in rows:
        ids = torch.tensor([tokens])
        labels = torch.where(torch.arange(len(tokens)) >= len(tokens) - counted, ids, -100)
        targets = int((labels[:, 1:] != -100).sum())
        total, count = total + model(ids, labels=labels).loss.item() * targets, count + targets
    return total / count


@pytest.mark.parametrize(
    "packing",
    [{}, {"packing": True, "packing_strategy": "bfd", "max_length": 64}, {"padding_free": True, "max_length": None}],
    ids=["padded", "packed", "padding_free"],
)
def test_sft_starts_from_the_models_own_loss_however_its_rows_are_laid(checkpoint, tmp_path, packing):
    data = [{"text": text} for text in TEXTS]
    trainer = sft(checkpoint, data, tmp_path, **{**packing, "per_device_train_batch_size": 4})
    expected = mean_nats(checkpoint, [([*text.encode(), 257], 99) for text in TEXTS])
    assert first_loss(trainer) == pytest.approx(expected, rel=1e-4)


def test_sft_on_completions_alone(small, tmp_path):
    data = [{"prompt": text, "completion": " yes"} for text in TEXTS]
    trainer = sft(small, data, tmp_path, completion_only_loss=True, per_device_train_batch_size=4)
    expected = mean_nats(small, [([*text.encode(), *b" yes", 257], 5) for text in TEXTS])
    assert first_loss(trainer) == pytest.approx(expected, rel=1e-4)


def test_sft_on_the_assistants_turns_alone(small, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(small)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(small)
    trainer = sft(small, [{"messages": TURNS}] * 4, tmp_path, assistant_only_loss=True)
    row = [256, *"user: is it é?".encode(), 257, *b"assistant: no", 257]
    assert first_loss(trainer) == pytest.approx(mean_nats(small, [(row, 3)]), rel=1e-4)


def test_an_adapter_on_lambda_is_trained_saved_loaded_merged_and_writes(small, tmp_path):
    adapter = LoraConfig(target_modules=["level_scales.proj"], r=2, task_type="CAUSAL_LM")
    trainer = sft(small, [{"text": text} for text in TEXTS], tmp_path, peft_config=adapter, learning_rate=0.05)
    first_loss(trainer)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ids, options = torch.tensor([list(b"some text")]), {"max_new_tokens": 6, "do_sample": False}
    base = LogLinearForCausalLM.from_pretrained(small)
    logits, text = loaded(ids).logits, loaded.generate(input_ids=ids, **options)
    assert not torch.allclose(logits, base(ids).logits)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.generate(ids, **options), text)


def test_dpo_starts_from_even_odds(checkpoint, tmp_path):
    data = Dataset.from_list([{"prompt": text, "chosen": " yes", "rejected": " nono"} for text in TEXTS])
    trainer = DPOTrainer(checkpoint, args=DPOConfig(str(tmp_path), **COMMON), train_dataset=data)
    assert first_loss(trainer) == pytest.approx(math.log(2), rel=1e-4)


def test_kto(checkpoint, tmp_path):
    data = Dataset.from_list([{"prompt": t, "completion": " yes", "label": i % 2 == 0} for i, t in enumerate(TEXTS)])
    trainer = KTOTrainer(checkpoint, args=KTOConfig(str(tmp_path), **COMMON), train_dataset=data)
    assert first_loss(trainer) == pytest.approx(0.5, rel=1e-4)  # a model and itself


def share_of_digits(completions, **kwargs):
    return [sum(character.isdigit() for character in text) / max(1, len(text)) for text in completions]


@pytest.mark.parametrize("kind", [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)], ids=["grpo", "rloo"])
def test_completions_are_rewarded(checkpoint, tmp_path, kind):
    trainer_class, config_class = kind
    settings = config_class(str(tmp_path), **COMMON, num_generations=2, max_completion_length=6, beta=0.04)
    data = Dataset.from_list([{"prompt": text} for text in TEXTS])
    first_loss(trainer_class(checkpoint, share_of_digits, args=settings, train_dataset=data))


def test_a_reward_model(checkpoint, tmp_path):
    data = Dataset.from_list([{"prompt": text, "chosen": " yes", "rejected": " nono"} for text in TEXTS])
    trainer = RewardTrainer(checkpoint, args=RewardConfig(str(tmp_path), **COMMON), train_dataset=data)
    assert isinstance(trainer.model, LogLinearForSequenceClassification)
    first_loss(trainer)
    trainer.save_model(str(tmp_path / "reward"))
    assert LogLinearForSequenceClassification.from_pretrained(tmp_path / "reward").num_labels == 1


def test_the_example_reinforces_a_checkpoint_on_its_reward(small, tmp_path):
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "grpo.py"))
    assert example["right"](completions=["7", " 7\n", "77", ""], answer=["7"] * 4, prompts=[""] * 4) == [1, 1, 0, 0]
    example["main"](small, tmp_path / "out", steps=2, longest=4)
    assert LogLinearForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 264
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("1")["input_ids"] == [256, ord("1")]

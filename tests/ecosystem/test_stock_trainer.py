"""transformers' own Trainer on our models: what it decides by a class's name, and what it reads from outputs."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, Trainer, TrainingArguments
from transformers.modelcard import TrainingSummary
from transformers.models.auto import modeling_auto

from loglinear import models
from loglinear.models import ByteTokenizer, LogLinearForSequenceClassification, LogLinearForTokenClassification
from loglinear.models.auto import MODELS
from loglinear.models.auto_file import AUTO_MAP
from tests.ecosystem.tiny import KINDS, tiny_model

TEXTS = ["a first text", "another", "and one more é", "short"]


def rows(length=24, count=4):
    tokens = torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row.clone()} for row in tokens]


def trainer_of(model, folder, data, **options):
    arguments = {name: options.pop(name) for name in list(options) if hasattr(TrainingArguments, name)}
    arguments = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 1, **arguments}
    settings = TrainingArguments(str(folder), report_to=[], disable_tqdm=True, use_cpu=True, seed=0, **arguments)
    return Trainer(model, settings, train_dataset=data, eval_dataset=data, **options)


@pytest.mark.parametrize("kind", ["mamba2", "hybrid"])
def test_label_smoothing_smooths_the_next_token(tmp_path, kind):
    model, data = tiny_model(**KINDS[kind]), rows()
    ids = torch.stack([row["input_ids"] for row in data])
    logits, targets = model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    smooth = F.log_softmax(logits, -1).mean(-1).neg().mean()
    expected = 0.9 * F.cross_entropy(logits, targets) + 0.1 * smooth
    trainer = trainer_of(model, tmp_path, data, label_smoothing_factor=0.1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    model.eval()  # the training step's own mode has no effect: there is no dropout
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_computed_from_logits(tmp_path, kind):
    model, data, seen = tiny_model(**KINDS[kind]), rows(count=5), []

    def accuracy(prediction):
        seen.append(prediction)
        return {"accuracy": (prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean()}

    metrics = trainer_of(model, tmp_path, data, compute_metrics=accuracy).evaluate()
    ids = torch.stack([row["input_ids"] for row in data])
    np.testing.assert_allclose(seen[0].predictions, model(ids).logits.detach(), rtol=1e-4, atol=1e-4)
    assert metrics["eval_accuracy"] == (model(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean()
    assert metrics["eval_loss"] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)


def test_every_registered_model_is_in_transformers_lists_of_names():
    for auto_class, names, model_class in MODELS:
        assert names["loglinear"] == model_class.__name__ == AUTO_MAP[auto_class.__name__].split(".")[1]
        assert getattr(models, model_class.__name__) is model_class
        assert (
            auto_class.from_config(models.LogLinearConfig(num_hidden_layers=1, hidden_size=8)).__class__ is model_class
        )
    assert "LogLinearForCausalLM" in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    assert len(AUTO_MAP) == len(MODELS) + 1


def test_a_model_card_names_the_task(tmp_path):
    card = TrainingSummary.from_trainer(trainer_of(tiny_model(), tmp_path, rows()))
    assert card.tasks == "text-generation"


def classified(label):
    tokenizer = ByteTokenizer()
    return [{**tokenizer(text), "labels": label(i, tokenizer(text)["input_ids"])} for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_classes_are_read_at_the_last_real_token(kind, side):
    model, tokenizer = tiny_model(LogLinearForSequenceClassification, num_labels=3, **KINDS[kind]), ByteTokenizer()
    tokenizer.padding_side = side
    together = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    alone = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_accumulated_steps_of_classification_are_the_step_of_the_whole_batch(tmp_path):
    data, losses = classified(lambda i, ids: i % 2), []
    for name, options in {"whole": (4, 1), "parts": (2, 2)}.items():
        model = tiny_model(LogLinearForSequenceClassification, num_labels=2)
        trainer = trainer_of(
            model,
            tmp_path / name,
            data,
            data_collator=DataCollatorWithPadding(ByteTokenizer()),
            logging_steps=1,
            per_device_train_batch_size=options[0],
            gradient_accumulation_steps=options[1],
            max_steps=2,
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 2 and losses[0][0] == pytest.approx(losses[1][0], rel=1e-3)


def test_tokens_are_classified(tmp_path):
    model = tiny_model(LogLinearForTokenClassification, num_labels=2)
    data = classified(lambda i, ids: [int(token > 110) for token in ids])
    collator = DataCollatorForTokenClassification(ByteTokenizer())
    trainer = trainer_of(model, tmp_path, data, data_collator=collator, max_steps=3)
    before, after = trainer.evaluate()["eval_loss"], (trainer.train(), trainer.evaluate())[1]["eval_loss"]
    assert after < before

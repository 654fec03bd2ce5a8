import tempfile

import torch
from transformers import Trainer, TrainingArguments

from loglinear.models import LogLinearConfig, LogLinearForCausalLM

sizes = dict(hidden_size=64, num_hidden_layers=1, num_heads=2, key_dim=16, head_dim=32, num_levels=8)
model = LogLinearForCausalLM(LogLinearConfig(**sizes))
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 256, (8, 64))]  # labels are shifted inside


def accuracy(prediction):
    logits, labels = prediction.predictions, prediction.label_ids
    return {"accuracy": (logits[:, :-1].argmax(-1) == labels[:, 1:]).mean()}


arguments = TrainingArguments(
    tempfile.mkdtemp(), max_steps=3, weight_decay=0.1, label_smoothing_factor=0.1, report_to=[], use_cpu=True
)
trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=accuracy)
trainer.train()
print(trainer.evaluate()["eval_accuracy"])
